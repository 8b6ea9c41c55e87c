"""The sum ΔW as an out × in matrix, for total ranks near or above the smaller side.

The terms come as an iterable, and only a chunk of their columns is in memory. The comparison with
FlexLoRA needs a second sum of the same terms, under weights w'. Both sums use the same products:
columns of equal ratio w / w' are multiplied together, P = (B w') A, and P is added to the second
sum, (w / w') P to the first. Under raFLoRA each partition has one ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.kernels import subspace
from fedlora_cli.kernels.concatenation import blocks, lengths, side_by_side
from fedlora_cli.kernels.cost import CHUNK
from fedlora_cli.kernels.leading import TOLERANCES, Leading, Unresolved
from fedlora_cli.linalg.factors import Factors

#: Columns per ratio below which two separate products are faster than a product for each ratio.
WORTH = 128

#: Rows of a product that is added to both sums: few enough to stay in the cache.
ROWS = 256

#: Bits in which two ratios w / w' must agree to count as equal: fewer than their rounding affects.
BITS = 40

#: The rounding of a sum in chunks, in unit roundoffs, relative to the norm of the sum plus that of
#: its pieces. At most 1.4 in measurements with up to 8192 columns in float32.
GROWTH = 2.0


@dataclass(frozen=True, eq=False)
class Term:
    """A term of the sum, with its weights (r,) and those of the second sum; None are zeros."""

    factors: Factors
    weights: Tensor
    reference: Tensor | None = None

    @property
    def reference_or_zeros(self) -> Tensor:
        return torch.zeros_like(self.weights) if self.reference is None else self.reference


@dataclass(frozen=True, eq=False)
class Dense:
    """A weighted sum (out, in), and `pieces`, the sum of its pieces' energies w² s² ‖b_i‖² ‖a_i‖².

    If the sum has much less energy, its pieces cancelled, and digits are lost in proportion.
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
    """The weighted sum in `dtype`, float32 or float64; with `reference`, the second sum too.

    Each term is read once; `CHUNK` columns and a term are in memory at most.
    """
    sums = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(1 + reference)]
    pieces = [0.0] * len(sums)
    chunk: list[Term] = []
    for term in terms:
        chunk.append(term)
        if sum(each.factors.rank for each in chunk) >= CHUNK:
            _add(chunk, sums, pieces)
            chunk = []
    if chunk:
        _add(chunk, sums, pieces)
    total, *second = map(Dense, sums, pieces)
    return total, second[0] if reference else None


def leading(dense: Dense, rank: int, dtype: str, near: float | None = None) -> Leading:
    """The leading `rank` directions, for an output in `dtype`; `near` as in `subspace.leading`.

    Raises Unresolved. If the reason is rounding, a float64 sum may succeed.
    """
    energy = float(lengths(dense.matrix).square().sum())
    tolerance = TOLERANCES[dtype]
    info = torch.finfo(dense.matrix.dtype)
    rounding = GROWTH * info.eps / 2 * (math.sqrt(energy) + math.sqrt(dense.pieces))
    rounding += info.tiny * math.sqrt(dense.matrix.numel())
    # `not <=` is also true for NaN, which an overflow may give.
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


def _add(chunk: list[Term], sums: list[Tensor], pieces: list[float]) -> None:
    """Adds terms to the sums, and the energies of their pieces to `pieces`."""
    total = sums[0]
    both = side_by_side([term.factors for term in chunk], total.dtype)
    size = lengths(both.L) * lengths(both.R.T)
    weights = [both.scales * torch.cat([term.weights for term in chunk])]
    if len(sums) == 2:
        weights.append(both.scales * torch.cat([term.reference_or_zeros for term in chunk]))
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
        members = (group == i).nonzero()[:, 0]
        alone = math.isinf(ratio)
        B = both.L[:, members] * weights[0 if alone else 1][members].to(total)
        _add_product(B, both.R[members], [(0, 1.0)] if alone else [(0, ratio), (1, 1.0)], sums)


def _add_product(B: Tensor, A: Tensor, into: list[tuple[int, float]], sums: list[Tensor]) -> None:
    """Adds factor · B A to sum i for each (i, factor) of `into`, by blocks of rows."""
    for rows in blocks(B.shape[0], ROWS):
        product = B[rows] @ A
        for i, factor in into:
            if factor != 0.0:
                sums[i][rows].add_(product, alpha=factor)


def _ratios(weights: Tensor, reference: Tensor) -> Tensor:
    """w / w' rounded to `BITS` bits; 1 if both are 0, infinite if only w' is 0."""
    quotient = torch.where((weights == 0) & (reference == 0), 1.0, weights / reference)
    mantissa, exponent = torch.frexp(quotient)
    rounded = torch.ldexp((mantissa * 2**BITS).round() / 2**BITS, exponent)
    return torch.where(reference == 0, torch.inf, rounded).where(quotient.isfinite(), torch.inf)
