"""Concatenated factors, and the Gram matrices of their columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.linalg.factors import Factors

#: Rows that are converted and multiplied at a time: 2.5 MB in float64 at a total rank of 600.
#: Also the number of float32 products that are summed before float64 takes over.
CHUNK = 512

#: Columns of a block of a symmetric product. Narrower blocks compute less but run slower. Of the
#: widths tried at a total rank of 600 (100 to 300), this is the fastest: `cost.TRIANGLE`.
WIDTH = 120


@dataclass(frozen=True, eq=False)
class ConcatenatedFactors:
    """L = [B_1 .. B_K] (out, S) and R = [A_1; ..; A_K] (S, in), S = sum r_k, without scales.

    `scales` (S,) in float64 holds every s_k r_k times. Scales multiply weights, never L or R.
    """

    L: Tensor
    R: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.L.shape[0], self.R.shape[1]

    def apply(self, weights: Tensor, V: Tensor) -> Tensor:
        """ΔW V = L (w s (R V)) for V (in, p) and weights (S,)."""
        inner = (self.scales * weights)[:, None] * long_product(self.R.T, V)
        return self.L @ inner.to(V)

    def adjoint(self, weights: Tensor, U: Tensor) -> Tensor:
        """ΔWᵀ U = Rᵀ (w s (Lᵀ U)) for U (out, p) and weights (S,)."""
        inner = (self.scales * weights)[:, None] * long_product(self.L, U)
        return self.R.T @ inner.to(U)


def side_by_side(terms: Sequence[Factors], dtype: torch.dtype) -> ConcatenatedFactors:
    """The factors in `dtype`, always copied.

    Without a copy, the last bits of products would depend on where a tensor begins in memory.
    """
    first, ranks = terms[0], [term.rank for term in terms]
    (rows, columns), S, device = first.shape, sum(ranks), first.B.device
    scales = torch.tensor([term.scale for term in terms], dtype=torch.float64, device=device)
    scales = scales.repeat_interleave(torch.tensor(ranks, device=device))
    L = torch.empty(rows, S, dtype=dtype, device=device)
    R = torch.empty(S, columns, dtype=dtype, device=device)
    views = zip(torch.split(L, ranks, dim=1), torch.split(R, ranks), terms, strict=True)
    for in_L, in_R, term in views:
        in_L.copy_(term.B)
        in_R.copy_(term.A)
    return ConcatenatedFactors(L, R, scales)


def lengths(X: Tensor) -> Tensor:
    """The lengths of X's columns, in float64, without a float64 copy of X."""
    squares = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    for rows in blocks(X.shape[0], CHUNK):
        squares += X[rows].double().square().sum(dim=0)
    return squares.sqrt()


def gram(X: Tensor, precision: torch.dtype) -> Tensor:
    """XᵀX (S, S) of X (n, S) in float64, from products in `precision`.

    Float32 products of 16-bit factors are exact. Sums of at most `CHUNK` of them are rounded to
    float32; these sums are added in float64.
    """
    columns = list(blocks(X.shape[1], WIDTH))
    total = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    for rows in blocks(X.shape[0], CHUNK):
        part = X[rows].to(precision)
        for block in columns:
            later = slice(block.start, None)
            if precision == torch.float64:
                total[block, later].addmm_(part[:, block].T, part[:, later])
            else:
                total[block, later] += part[:, block].T @ part[:, later]
    return mirrored(total)


def mirrored(upper: Tensor) -> Tensor:
    """Copies the upper triangle, in blocks of `WIDTH`, to the lower triangle, in place."""
    for block in blocks(upper.shape[0], WIDTH):
        later = slice(block.stop, None)
        upper[later, block] = upper[block, later].T
    return upper


def long_product(X: Tensor, Y: Tensor) -> Tensor:
    """XᵀY in float64, from sums of `CHUNK` products: rounding grows with the length of a sum."""
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
    for rows in blocks(X.shape[0], CHUNK):
        total += X[rows].T @ Y[rows]
    return total


def blocks(size: int, width: int) -> Iterator[slice]:
    """Consecutive slices of 0..size, at most `width` long."""
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))
