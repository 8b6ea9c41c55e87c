"""ΔW itself, summed term by term, where the total rank comes near the smaller side or exceeds it.

The terms come as an iterable, and no more than a chunk of their columns is in memory. A second sum
under other weights w' of the same terms, which a comparison of methods needs, comes out of the same
products: columns with one ratio w / w' are multiplied together, P = (B w') A, and P goes into
the second sum, (w / w') P into the first. Under raFLoRA there is one ratio per partition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.kernels import subspace
from fedlora_cli.kernels.concatenation import blocks, lengths, side_by_side
from fedlora_cli.kernels.leading import TOLERANCES, Leading, Unresolved
from fedlora_cli.linalg.factors import Factors

#: Columns that are multiplied at a time. More would round more in float32.
CHUNK = 1024

#: Fewer columns than this per ratio, and two plain products take less time than one of each ratio.
WORTH = 128

#: Rows of a product that goes into both sums: small enough to stay in the cache.
ROWS = 256

#: Bits to which quotients w / w' are compared: fewer than their rounding leaves equal.
BITS = 40

#: The rounding of a sum in float32 by chunks, in roundings of one number, relative to
#: the norms of the sum and of its pieces together. Measured up to 8192 columns: 1.4 at most.
GROWTH = 2.0


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the sum, with its weights (r,) and, where asked for, those of the second sum."""

    factors: Factors
    weights: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """A weighted sum (out, in), and the energy that its rank-one pieces have apart.

    `pieces` is sum w² s² ‖b_i‖² ‖a_i‖². A sum with much less energy than that is one of pieces that
    cancel, and has lost as many digits.
    """

    matrix: Tensor
    pieces: float


def accumulate(
    terms: Iterable[Term],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    reference: bool = False,
) -> tuple[Dense, Dense | None]:
    """The weighted sum in `dtype`, float32 or float64, and with `reference` that of w' too.

    Every term is looked at once; no more than `CHUNK` columns and one term are held.
    """
    sums = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(1 + reference)]
    pieces = [0.0] * len(sums)
    held: list[Term] = []
    for term in terms:
        held.append(term)
        if sum(one.factors.rank for one in held) >= CHUNK:
            _add(held, sums, pieces)
            held = []
    if held:
        _add(held, sums, pieces)
    found = [Dense(matrix, size) for matrix, size in zip(sums, pieces, strict=True)]
    return found[0], found[1] if reference else None


def singular_values(dense: Dense, rank: int, dtype: str) -> Tensor:
    """The leading `rank` singular values, as exact as an output in `dtype` asks for.

    A flat spectrum is no obstacle, as their directions need not be told apart. Raises Unresolved.
    """
    return leading(dense, rank, dtype, near=math.inf).s


def leading(dense: Dense, rank: int, dtype: str, near: float | None = None) -> Leading:
    """The leading `rank` directions, for an output in `dtype`; `near` as in `subspace.leading`.

    Raises Unresolved; where the message names rounding, a sum in float64 may do.
    """
    energy = float(lengths(dense.matrix).square().sum())
    tolerance = TOLERANCES[dtype]
    info = torch.finfo(dense.matrix.dtype)
    rounding = GROWTH * info.eps / 2 * (math.sqrt(energy) + math.sqrt(dense.pieces))
    rounding += info.tiny * math.sqrt(dense.matrix.numel())
    # Not `>`: an overflow is an infinite sum, or none that can be compared.
    if dense.pieces > 0.0 and not rounding <= tolerance * math.sqrt(energy):
        raise Unresolved(f"rounding of {rounding:.0e} in a sum of {math.sqrt(energy):.0e}")
    operator = subspace.Operator(
        shape=(dense.matrix.shape[0], dense.matrix.shape[1]),
        apply=lambda V: dense.matrix @ V,
        adjoint=lambda U: dense.matrix.T @ U,
        energy=energy,
        like=dense.matrix,
    )
    return subspace.leading(operator, rank, tolerance, near=near)


def _add(held: list[Term], sums: list[Tensor], pieces: list[float]) -> None:
    """Add some terms to the sums, and the energy of their pieces to `pieces`."""
    total = sums[0]
    both = side_by_side([one.factors for one in held], total.dtype)
    size = lengths(both.L) * lengths(both.R.T)
    weights = [both.scales * torch.cat([one.weights for one in held])]
    if len(sums) == 2:
        weights.append(both.scales * torch.cat([_reference(one) for one in held]))
    for i, weight in enumerate(weights):
        pieces[i] += float((weight * size).square().sum())
    if len(sums) == 1:
        total.addmm_(both.L * weights[0].to(total), both.R)
        return
    ratios = _ratios(*weights)
    distinct, group = torch.unique(ratios, return_inverse=True)
    if distinct.numel() * WORTH > ratios.numel():
        for matrix, weight in zip(sums, weights, strict=True):
            matrix.addmm_(both.L * weight.to(matrix), both.R)
        return
    for i, ratio in enumerate(distinct.tolist()):
        own = (group == i).nonzero()[:, 0]
        alone = math.isinf(ratio)
        B = both.L[:, own] * weights[0 if alone else 1][own].to(total)
        _add_product(B, both.R[own], [(0, 1.0)] if alone else [(0, ratio), (1, 1.0)], sums)


def _add_product(B: Tensor, A: Tensor, into: list[tuple[int, float]], sums: list[Tensor]) -> None:
    """Add factor · B A to some of the sums, by blocks of rows; factors of 0 add nothing."""
    for rows in blocks(B.shape[0], ROWS):
        product = B[rows] @ A
        for i, factor in into:
            if factor != 0.0:
                sums[i][rows].add_(product, alpha=factor)


def _ratios(weights: Tensor, reference: Tensor) -> Tensor:
    """w / w' rounded to `BITS` bits, infinite where w' is 0 and w is not, 1 where both are 0."""
    quotient = torch.where((weights == 0) & (reference == 0), 1.0, weights / reference)
    mantissa, exponent = torch.frexp(quotient)
    rounded = torch.ldexp((mantissa * 2**BITS).round() / 2**BITS, exponent)
    return torch.where(reference == 0, torch.inf, rounded).where(quotient.isfinite(), torch.inf)


def _reference(term: Term) -> Tensor:
    if term.reference is None:
        return torch.zeros_like(term.weights)
    return term.reference
