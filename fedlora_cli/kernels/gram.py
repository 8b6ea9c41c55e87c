"""Leading directions from the Gram matrices of the concatenated factors.

Let ΔW = L diag(v) R, with columns of L and rows of R of length one, G_L = LᵀL = C Cᵀ, G_R = RRᵀ and
K = Cᵀ diag(v) G_R diag(v) C (S, S). The eigenvalues of K are the squared singular values s² of ΔW;
an eigenvector y gives the right singular vector Rᵀ diag(v) C y / s.

Gram matrices square the condition number. So their precision has at most the square of the output's
eps, and K serves only to find the subspace. ΔW V and the residual are computed from the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.kernels import eigen
from fedlora_cli.kernels.concatenation import (
    WIDTH,
    ConcatenatedFactors,
    blocks,
    gram,
    mirrored,
    side_by_side,
)
from fedlora_cli.kernels.leading import (
    TOLERANCES,
    Leading,
    Unresolved,
    nothing,
    oriented,
    orthonormal,
    ritz,
    solvable,
)
from fedlora_cli.linalg.factors import Factors

#: Smallest ratio of a squared singular value to its rounding for its direction to be resolved.
CLEAR = 10

#: Number of random combinations of directions from which a residual is measured.
PROBES = 16

#: The error of the eigenvectors of K is the tolerance of the residual divided by this.
DIRECTIONS = 64

#: Largest relative difference between the energies by K and by the factors.
SEEN = 1e-3

#: Largest share of the energy that may be rounding of the Gram matrices, for singular values
#: without directions. It excludes pieces that cancel.
LOST = 0.03


@dataclass(frozen=True, eq=False)
class Grams:
    """The sum over k of s_k B_k diag(w_k) A_k, prepared for any weights w.

    - `L`, `R` (S, S) in float64: the Gram matrices of B's columns and A's rows, each divided by its
      length, so that small pieces keep their digits. `b`, `a` (S,): these lengths.
    - `concatenated`: the factors in float32. `rounding`: the rounding of an entry of `L` or `R`.
    """

    terms: tuple[Factors, ...]
    concatenated: ConcatenatedFactors
    L: Tensor
    R: Tensor
    b: Tensor
    a: Tensor
    rounding: float
    tolerance: float

    @property
    def lengths(self) -> Tensor:
        """The lengths s_k ‖b_i‖ ‖a_i‖ of the pieces, with the sign of s_k. Shape (S,)."""
        return self.concatenated.scales * self.b * self.a


def prepare(terms: Sequence[Factors], dtype: str) -> Grams:
    """The Gram matrices for an output in `dtype`; Unresolved if a product leaves its range."""
    precision = torch.float64 if dtype == "float32" else torch.float32
    concatenated = side_by_side(terms, torch.float32)
    L, b = _cosines(concatenated.L, precision)
    R, a = _cosines(concatenated.R.T, precision)
    rounding = torch.finfo(precision).eps / 2
    return Grams(tuple(terms), concatenated, L, R, b, a, rounding, TOLERANCES[dtype])


def spectrum(grams: Grams, k: int) -> Tensor:
    """The singular values of the update of term k; see `_values`."""
    start = sum(term.rank for term in grams.terms[:k])
    pieces = slice(start, start + grams.terms[k].rank)
    return _values(grams, pieces, grams.lengths[pieces])


def singular_values(grams: Grams, weights: Tensor, count: int) -> Tensor:
    """The leading `count` singular values of the weighted sum; see `_values`."""
    v = weights * grams.lengths
    pieces = v.nonzero()[:, 0]
    return _values(grams, pieces, v[pieces])[:count]


@solvable()
def leading(grams: Grams, weights: Tensor, rank: int) -> Leading:
    """The leading `rank` directions of the weighted sum; fewer if fewer pieces have weight.

    Raises Unresolved if a direction is below the rounding of the Gram matrices, or the residual is
    too large: if terms nearly cancel, or the sum has a lower rank.
    """
    v = weights * grams.lengths
    weighted = v.nonzero()[:, 0]
    rank = min(rank, *grams.concatenated.shape, weighted.numel())
    if rank == 0:
        return nothing(grams.concatenated.shape, grams.concatenated.L)
    v, G_L, G_R = v[weighted], _part(grams.L, weighted), _part(grams.R, weighted)
    total = float(v @ (G_L * G_R) @ v)  # ‖ΔW‖² = tr(diag(v) G_L diag(v) G_R)
    if not 0.0 < total < math.inf:
        raise Unresolved("the terms cancel, or leave the range of float64")
    norm = math.sqrt(total)
    C, T, K = _core(G_L, G_R, v)
    squared, Y = eigen.top(K, rank, grams.tolerance / DIRECTIONS)
    s = squared.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    h, g = v[:, None] * (C @ Y), T @ Y / s  # ΔWᵀ u_i = Rᵀ h_i and ΔW v_i = L g_i
    noise = _noise(G_L, grams.rounding) * g.square().sum(dim=0)
    noise += _noise(G_R, grams.rounding) * h.square().sum(dim=0) + _core_noise(G_L, G_R, v)
    if bool((squared < CLEAR * noise).any()):
        raise Unresolved("a direction in the rounding of the Gram matrices")

    # Rounding of float32 products grows with the pieces that add up to a direction.
    pieces = math.hypot(float(torch.linalg.vector_norm(g)), float(torch.linalg.vector_norm(h)))
    single = torch.finfo(torch.float32).eps * pieces <= grams.tolerance * norm
    X = _spread(h / s / grams.a[weighted, None], weighted, grams.a.numel())
    Y = _spread(g / grams.b[weighted, None], weighted, grams.b.numel())
    residual = math.inf
    for dtype in (torch.float32, torch.float64) if single else (torch.float64,):
        exact = dtype == torch.float64
        concatenated = side_by_side(grams.terms, dtype) if exact else grams.concatenated
        U, s, V = _directions(concatenated, X, Y)
        residual = _residual(concatenated, weights, U, s, V)
        # Factors that underflow in float32 leave no residual, but less energy.
        difference = abs(float(s.square().sum() - squared.sum()))
        if residual <= grams.tolerance * norm and difference <= SEEN * total:
            return oriented(U, s, V, total, residual)
    raise Unresolved(f"a residual of {residual / norm:.1e}")


def _directions(
    concatenated: ConcatenatedFactors, X: Tensor, Y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of the space of Rᵀ X (orthonormal up to rounding), whose image under ΔW is L Y."""
    V, T = orthonormal(concatenated.R.T @ X.to(concatenated.R))
    image = concatenated.L @ torch.linalg.solve_triangular(T, Y, upper=True, left=False).to(
        concatenated.L
    )
    return ritz(V, image)


def _residual(
    concatenated: ConcatenatedFactors, weights: Tensor, U: Tensor, s: Tensor, V: Tensor
) -> float:
    """About sqrt(sum ‖ΔWᵀ u_i - s_i v_i‖²), from the factors.

    For many directions, estimated from `PROBES` random combinations of them (Hutchinson): within
    about a third, in half the time.
    """
    mix = torch.eye(s.numel(), dtype=s.dtype)
    if s.numel() > 2 * PROBES:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(s.numel(), PROBES, generator=generator, dtype=s.dtype) / PROBES**0.5
    mix = mix.to(s)
    rest = concatenated.adjoint(weights, U @ mix.to(U)) - V @ (s[:, None] * mix).to(V)
    return float(torch.linalg.vector_norm(rest, dtype=torch.float64))


def _spread(coefficients: Tensor, pieces: Tensor, size: int) -> Tensor:
    """Rows for all `size` pieces: the coefficients of the given pieces, and zeros."""
    if pieces.numel() == size:
        return coefficients
    return coefficients.new_zeros(size, coefficients.shape[1]).index_copy(0, pieces, coefficients)


def _core(G_L: Tensor, G_R: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, lower triangular, with C Cᵀ = G_L; T = diag(v) G_R diag(v) C; and K = Cᵀ T."""
    C, failed = torch.linalg.cholesky_ex(G_L)
    if failed:
        # Parallel columns: G_L is not positive definite in this precision.
        with solvable():
            squared, Q = torch.linalg.eigh(G_L)
        C = torch.linalg.qr((Q * squared.clamp(min=0.0).sqrt()).T, mode="r")[1].T
    weighted = v[:, None] * G_R * v
    T, K = torch.empty_like(weighted), torch.empty_like(weighted)
    for block in blocks(v.numel(), WIDTH):
        later = slice(block.start, None)  # C is zero above
        T[:, block] = weighted[:, later] @ C[later, block]
    for block in blocks(v.numel(), WIDTH):
        later = slice(block.start, None)
        K[block, later] = C[later, block].T @ T[later, later]
    return C, T, mirrored(K)


def _values(grams: Grams, pieces: Tensor | slice, v: Tensor) -> Tensor:
    """The singular values of a sum of pieces, descending, without those below rounding.

    Raises Unresolved if much of the sum may be rounding.
    """
    if v.numel() == 0:
        return v
    G_L, G_R = _part(grams.L, pieces), _part(grams.R, pieces)
    _, _, K = _core(G_L, G_R, v)
    # Eigenvalues need no more digits than the Gram matrices have.
    single = grams.rounding > torch.finfo(torch.float64).eps
    squared = eigen.values(K, torch.float32 if single else torch.float64)
    # Without eigenvectors, the bound takes every piece in full.
    rounding = _noise(G_L, grams.rounding) + _noise(G_R, grams.rounding)
    noise = rounding * float(v.square().sum()) + _core_noise(G_L, G_R, v)
    # `not <=` is also true for NaN, which an overflow may give.
    if not noise <= LOST * float(squared.clamp(min=0.0).sum()):
        raise Unresolved("the energy is in the rounding of the Gram matrices")
    values: Tensor = squared[squared > noise].sqrt()
    return values


def _noise(G: Tensor, rounding: float) -> float:
    """About the spectral norm of the rounding of a Gram matrix of unit columns.

    Measured at S = 600: 3 times the rounding of an entry for independent columns, 37 times for
    parallel columns. Four times the root of the matrix norm is above both.

    An error E in G_L moves s_i² by g_iᵀ E g_i, with ΔW v_i = L g_i; an error in G_R by h_iᵀ E h_i,
    with ΔWᵀ u_i = Rᵀ h_i. If nothing cancels, ‖g_i‖ is near s_i, and small directions are as exact
    as large directions.
    """
    return 4 * rounding * math.sqrt(float(torch.linalg.matrix_norm(G)))


def _core_noise(G_L: Tensor, G_R: Tensor, v: Tensor) -> float:
    """The rounding of the products that form K, and of its eigenvalues."""
    size = torch.linalg.matrix_norm(G_L) * torch.linalg.matrix_norm(v[:, None] * G_R * v)
    return torch.finfo(torch.float64).eps * float(size)


def _part(G: Tensor, pieces: Tensor | slice) -> Tensor:
    """The rows and columns of the given pieces; no copy if these are all."""
    if isinstance(pieces, slice):
        return G[pieces, pieces]
    return G if pieces.numel() == G.shape[0] else G[pieces[:, None], pieces]


def _cosines(X: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cosines between X's columns, and the lengths of the columns. Raises Unresolved."""
    G = gram(X, precision)
    squares = G.diagonal().clone()
    info = torch.finfo(precision)
    # Squares near underflow have lost digits.
    faint = squares < info.tiny / info.eps
    if bool(X[:, faint].any()) or not bool(torch.isfinite(squares).all()):
        raise Unresolved("squares of the factors leave the range of their precision")
    lengths = torch.where(faint, 0.0, squares.sqrt())
    inverse = torch.where(faint, 0.0, 1 / lengths)
    return G.mul_(inverse).mul_(inverse[:, None]), lengths
