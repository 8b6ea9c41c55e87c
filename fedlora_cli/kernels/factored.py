"""Leading directions by products with the factors; forms nothing of size S × S or out × in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_cli.kernels import subspace
from fedlora_cli.kernels.concatenation import (
    CHUNK,
    ConcatenatedFactors,
    blocks,
    lengths,
    side_by_side,
)
from fedlora_cli.kernels.cost import BYTES
from fedlora_cli.kernels.leading import TOLERANCES, Leading, Unresolved
from fedlora_cli.linalg.factors import Factors

#: The rounding of products with the concatenated factors, in unit roundoffs.
GROWTH = 3.0

#: Largest relative rounding of ‖sum‖², which is a sum of terms that may cancel.
SEEN = 1e-2


def prepare(terms: Sequence[Factors], dtype: str) -> ConcatenatedFactors:
    """The factors, in float64 unless the output has 16 bits: for a flat spectrum in float32,
    products in float32 are not exact enough.
    """
    return side_by_side(terms, torch.float32 if BYTES[dtype] == 2 else torch.float64)


def energy(concatenated: ConcatenatedFactors, weights: Tensor) -> float:
    """‖sum‖_F² = sum_ij v_i (LᵀL)_ij v_j (RRᵀ)_ij, v = w s, from blocks of `CHUNK` × `CHUNK`.

    Blocks are computed in the dtype of the factors and summed in float64.
    """
    v = concatenated.scales * weights
    total = 0.0
    for block in blocks(v.numel(), CHUNK):
        for other in blocks(block.stop, CHUNK):
            pieces = (concatenated.L[:, block].T @ concatenated.L[:, other]).double()
            pieces *= concatenated.R[block] @ concatenated.R[other].T
            twice = 1 if other.stop == block.stop else 2
            total += twice * float(v[block] @ pieces @ v[other])
    return total


def leading(
    concatenated: ConcatenatedFactors,
    weights: Tensor,
    rank: int,
    dtype: str,
    near: float | None = None,
) -> Leading:
    """The leading `rank` directions of the weighted sum, as by `subspace.leading`."""
    b, a = lengths(concatenated.L), lengths(concatenated.R.T)
    sizes = (weights * concatenated.scales * b * a).abs()
    weighted = sizes > 0
    if bool(weighted.any()):
        extent = torch.cat([b[weighted], a[weighted], sizes.max()[None]])
        _check_range(extent, concatenated.L.dtype)
    total, tolerance = energy(concatenated, weights), TOLERANCES[dtype]
    pieces = float(sizes.square().sum())
    rounding = GROWTH * torch.finfo(concatenated.L.dtype).eps / 2
    # If pieces cancel, rounding may dominate the sum or its energy.
    norm, size = max(total, 0.0) ** 0.5, (max(total, 0.0) + pieces) ** 0.5
    exact = rounding * size <= tolerance * norm and rounding * size**2 <= SEEN * norm**2
    if pieces > 0.0 and not exact:
        raise Unresolved(f"rounding in a sum of {norm:.0e}")
    operator = subspace.Operator(
        shape=concatenated.shape,
        apply=lambda V: concatenated.apply(weights, V),
        adjoint=lambda U: concatenated.adjoint(weights, U),
        energy=total,
        like=concatenated.L,
    )
    return subspace.leading(operator, rank, tolerance, near=near)


def _check_range(sizes: Tensor, dtype: torch.dtype) -> None:
    """Raises Unresolved if products of pieces of these sizes could underflow or overflow."""
    info = torch.finfo(dtype)
    least, most = (info.tiny / info.eps) ** 0.5, info.max**0.5 * info.eps
    if not bool(((sizes > least) & (sizes < most)).all()):
        raise Unresolved("squares of the factors leave the range of their precision")
