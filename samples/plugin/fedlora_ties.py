"""TIES merging of low-rank updates (arXiv:2306.01708): trim, elect a sign, merge what agrees.

For each module, entry by entry of the dense updates ΔW_k = s_k B_k A_k (out, in):

1. trim: of each ΔW_k, keep the DENSITY · out · in entries of largest magnitude, and those equal to
   the smallest of them; the others are 0. The result is τ_k.
2. elect: the sign of sum_k p_k τ_k, p_k = n_k / N.
3. merge: the mean of the τ_k that have this sign and are not 0, weighted by p_k; 0 if the sum is 0.

The result has entries of all clients side by side, so its rank is up to min(out, in), whatever the
ranks of the clients; `compress="svd"` writes its best approximation at the output rank, and the
report shows the kept energy. The paper trims the whole model at once; here, each module is trimmed
by itself, because modules are read one by one.

Cost of a module: K products of out · in · r_k, K selections over out · in entries, and about ten
float64 matrices (out, in) in memory, then the decomposition of a dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora_cli import Factors, Method, by_samples

if TYPE_CHECKING:  # `fedlora methods` imports this file, and torch takes seconds
    from torch import Tensor

#: The share of entries that the trim keeps: the default of the paper.
DENSITY = 0.2


def trim(update: Tensor) -> Tensor:
    """The update with its largest entries alone."""
    sizes = update.abs()
    kept = max(1, round(DENSITY * sizes.numel()))
    threshold = sizes.flatten().kthvalue(sizes.numel() - kept + 1).values
    return update * (sizes >= threshold)


def merge(updates: Sequence[Factors], weights: Sequence[Tensor]) -> Tensor:
    """The merged update (out, in)."""
    shape = updates[0].shape
    # The positive and the negative entries, summed separately, in one pass over the clients.
    sums, shares = (updates[0].B.new_zeros(2, *shape) for _ in range(2))
    for update, weight in zip(updates, weights, strict=True):
        share = weight[0]  # all clients hold the first rank index
        trimmed = trim(update.B @ update.A)
        for side, entries in enumerate((trimmed.clamp(min=0), trimmed.clamp(max=0))):
            sums[side] += share * entries
            shares[side] += share * (entries != 0)
    means = (sums / shares).nan_to_num()  # 0 / 0: no client has this sign
    elected = sums[0] + sums[1]
    return means[0] * (elected > 0) + means[1] * (elected < 0)


METHOD = Method(
    name="ties",
    summary="largest entries, merged where their signs agree",
    formula="n_k / N, among the clients of the elected sign",
    source="arXiv:2306.01708",
    rule=by_samples,
    merge=merge,
    compress="svd",
    basis_free=True,
    uses_norms=False,
)
