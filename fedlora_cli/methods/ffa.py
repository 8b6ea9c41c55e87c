"""FFA-LoRA: one frozen A for all clients, B averaged by samples.

ΔW = (sum_k p_k s_k B_k) A, exact without an SVD because every A_k is the first r_k rows of one A;
that is checked bit by bit. Source: arXiv:2403.12313.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_samples


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N, on B alone."""
    return by_samples(holdings)


METHOD = Method(
    name="ffa",
    summary="B averaged by samples over one frozen, shared A",
    formula="n_k / N, on B",
    source="arXiv:2403.12313",
    rule=rule,
    merge="shared",
    compress="none",
    basis_free=False,
    uses_norms=False,
)
