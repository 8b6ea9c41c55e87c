"""Leading directions through the Gram matrices of the stacked factors.

With L diag(v) R = ΔW, the columns of L and rows of R of length one, G_L = LᵀL = C Cᵀ and G_R = RRᵀ,
the eigenvalues of K = Cᵀ diag(v) G_R diag(v) C (S, S) are the squares of ΔW's singular values, and
an eigenvector y gives the right singular vector Rᵀ diag(v) C y / s without solving for anything.

Gram matrices square the condition number. So they are formed in a precision whose eps is at most
the square of the output's, K only finds the subspace, ΔW V is then taken from the factors
themselves, and the residual is measured by them too.
"""

from __future__ import annotations

import itertools
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

#: How many times its own rounding a squared singular value must be for its direction to be known.
CLEAR = 10

#: Random combinations of directions by which a residual is measured.
PROBES = 16

#: How many times more exact the directions in the core are than the residual has to be.
DIRECTIONS = 64

#: The relative difference between the energy that K sees and the factors have, at most.
SEEN = 1e-3

#: The share of the energy that may lie in the rounding of the Gram matrices, where singular values
#: are wanted alone: pieces that cancel would leave none.
LOST = 0.03


@dataclass(frozen=True, eq=False)
class Grams:
    """The terms of sum_k s_k B_k diag(w_k) A_k, prepared once for any weights w.

    `L` and `R` (S, S) in float64 are the Gram matrices of B's columns and A's rows divided by
    their lengths, `b` and `a` (S,): cosines, so that no piece is too small to be seen.
    `concatenated` are the factors themselves in float32. `rounding` is that of one entry.
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
        """s_k ‖b_i‖ ‖a_i‖ of the rank-one pieces, with the sign of s_k. Shape (S,)."""
        return self.concatenated.scales * self.b * self.a


def prepare(terms: Sequence[Factors], dtype: str) -> Grams:
    """The Gram matrices that an output in `dtype` needs: float32, bfloat16 or float16.

    Raises Unresolved where a product leaves the range of its precision.
    """
    precision = torch.float64 if dtype == "float32" else torch.float32
    concatenated = side_by_side(terms, torch.float32)
    L, b = _cosines(concatenated.L, precision)
    R, a = _cosines(concatenated.R.T, precision)
    rounding = torch.finfo(precision).eps / 2
    return Grams(tuple(terms), concatenated, L, R, b, a, rounding, TOLERANCES[dtype])


def spectrum(grams: Grams, k: int) -> Tensor:
    """The singular values of term k's own update, descending, those in the rounding left out.

    Raises Unresolved where that may be much of it.
    """
    own = _places(grams)[k]
    return _values(grams, own, grams.lengths[own])


def energy(grams: Grams, weights: Tensor) -> float:
    """‖sum‖_F² = tr(diag(v) G_L diag(v) G_R), v = w · lengths."""
    v = weights * grams.lengths
    return max(float(v @ (grams.L * grams.R) @ v), 0.0)


def singular_values(grams: Grams, weights: Tensor, count: int) -> Tensor:
    """The leading `count` singular values of the weighted sum, those in the rounding left out.

    Raises Unresolved where that may be much of it.
    """
    v = weights * grams.lengths
    held = v.nonzero()[:, 0]
    return _values(grams, held, v[held])[:count]


@solvable()
def leading(grams: Grams, weights: Tensor, rank: int) -> Leading:
    """The leading `rank` directions of the weighted sum; fewer where fewer pieces have weight.

    Raises Unresolved where one of them does not stand clear of the rounding of the Gram matrices,
    or the residual is too large: terms that nearly cancel, or fewer directions than `rank`.
    """
    v = weights * grams.lengths
    held = v.nonzero()[:, 0]
    rank = min(rank, *grams.concatenated.shape, held.numel())
    if rank == 0:
        return nothing(grams.concatenated.shape, grams.concatenated.L)
    v, G_L, G_R = v[held], _part(grams.L, held), _part(grams.R, held)
    total = float(v @ (G_L * G_R) @ v)
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

    # Products in float32 round by the size of the pieces that make up a direction.
    pieces = math.hypot(float(torch.linalg.vector_norm(g)), float(torch.linalg.vector_norm(h)))
    single = torch.finfo(torch.float32).eps * pieces <= grams.tolerance * norm
    X = _spread(h / s / grams.a[held, None], held, grams.a.numel())
    Y = _spread(g / grams.b[held, None], held, grams.b.numel())
    residual = math.inf
    for dtype in (torch.float32, torch.float64) if single else (torch.float64,):
        exact = dtype == torch.float64
        concatenated = side_by_side(grams.terms, dtype) if exact else grams.concatenated
        U, found, V = _directions(concatenated, X, Y)
        residual = _residual(concatenated, weights, U, found, V)
        # The energy is compared too: factors that underflow in float32 would leave no residual.
        seen = abs(float(found.square().sum() - squared.sum()))
        if residual <= grams.tolerance * norm and seen <= SEEN * total:
            return oriented(U, found, V, total, residual)
    raise Unresolved(f"a residual of {residual / norm:.1e}")


def _directions(
    concatenated: ConcatenatedFactors, X: Tensor, Y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of the space of Rᵀ X, whose image under ΔW is L Y.

    Rᵀ X is orthonormal but for rounding. Its image needs no product with R: RRᵀ was at hand.
    """
    V, T = orthonormal(concatenated.R.T @ X.to(concatenated.R))
    image = concatenated.L @ torch.linalg.solve_triangular(T, Y, upper=True, left=False).to(
        concatenated.L
    )
    return ritz(V, image)


def _residual(
    concatenated: ConcatenatedFactors, weights: Tensor, U: Tensor, s: Tensor, V: Tensor
) -> float:
    """About sqrt(sum ‖ΔWᵀ u_i - s_i v_i‖²), from the factors.

    Where there are many directions, from `PROBES` random combinations of them (Hutchinson): the
    mean of their squares is that sum, give or take a third, for half the time.
    """
    mix = torch.eye(s.numel(), dtype=s.dtype)
    if s.numel() > 2 * PROBES:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(s.numel(), PROBES, generator=generator, dtype=s.dtype) / PROBES**0.5
    mix = mix.to(s)
    rest = concatenated.adjoint(weights, U @ mix.to(U)) - V @ (s[:, None] * mix).to(V)
    return float(torch.linalg.vector_norm(rest, dtype=torch.float64))


def _spread(coefficients: Tensor, held: Tensor, size: int) -> Tensor:
    """Coefficients of the pieces `held` at their places among all `size` pieces."""
    if held.numel() == size:
        return coefficients
    return coefficients.new_zeros(size, coefficients.shape[1]).index_copy(0, held, coefficients)


def _core(G_L: Tensor, G_R: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, lower triangular, with C Cᵀ = G_L; T = diag(v) G_R diag(v) C; and K = Cᵀ T."""
    C, failed = torch.linalg.cholesky_ex(G_L)
    if failed:
        # Parallel columns: not positive definite in this precision.
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


def _values(grams: Grams, held: Tensor | slice, v: Tensor) -> Tensor:
    """The singular values of the pieces `held`, descending, those in the rounding left out."""
    if v.numel() == 0:
        return v
    G_L, G_R = _part(grams.L, held), _part(grams.R, held)
    _, _, K = _core(G_L, G_R, v)
    # Never more exact than the Gram matrices are.
    single = grams.rounding > torch.finfo(torch.float64).eps
    squared = eigen.values(K, torch.float32 if single else torch.float64)
    # Without eigenvectors: every piece in full.
    rounding = _noise(G_L, grams.rounding) + _noise(G_R, grams.rounding)
    noise = rounding * float(v.square().sum()) + _core_noise(G_L, G_R, v)
    # Not `>`: an overflow cannot be compared. Pieces that are all zero have no noise either.
    if not noise <= LOST * float(squared.clamp(min=0.0).sum()):
        raise Unresolved("the energy is in the rounding of the Gram matrices")
    values: Tensor = squared[squared > noise].sqrt()
    return values


def _noise(G: Tensor, rounding: float) -> float:
    """About the spectral norm of the rounding of a Gram matrix of unit columns.

    Measured, in roundings of one entry, at S = 600: 3 for independent columns, 37 for parallel
    ones. The square root of its norm has that form; four times it stays above both.

    An error E in G_L moves s_i² by g_iᵀ E g_i, ΔW v_i = L g_i; one in G_R by h_iᵀ E h_i,
    ΔWᵀ u_i = Rᵀ h_i. Where nothing cancels ‖g_i‖ is near s_i, and small directions are as exact as
    large ones.
    """
    return 4 * rounding * math.sqrt(float(torch.linalg.matrix_norm(G)))


def _core_noise(G_L: Tensor, G_R: Tensor, v: Tensor) -> float:
    """The rounding of K's own products and of its eigenvalues."""
    size = torch.linalg.matrix_norm(G_L) * torch.linalg.matrix_norm(v[:, None] * G_R * v)
    return torch.finfo(torch.float64).eps * float(size)


def _places(grams: Grams) -> list[slice]:
    """Where each term's pieces stand."""
    stops = itertools.accumulate(term.rank for term in grams.terms)
    return [slice(stop - term.rank, stop) for term, stop in zip(grams.terms, stops, strict=True)]


def _part(G: Tensor, held: Tensor | slice) -> Tensor:
    """The rows and columns of some pieces; no copy where that is all of them."""
    if isinstance(held, slice):
        return G[held, held]
    return G if held.numel() == G.shape[0] else G[held[:, None], held]


def _cosines(X: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """The Gram matrix of X's columns divided by their lengths, and those. Raises Unresolved."""
    G = gram(X, precision)
    squares = G.diagonal().clone()
    info = torch.finfo(precision)
    # Where squares underflow they have lost digits, or all of them.
    faint = squares < info.tiny / info.eps
    if bool(X[:, faint].any()) or not bool(torch.isfinite(squares).all()):
        raise Unresolved("squares of the factors leave the range of their precision")
    lengths = torch.where(faint, 0.0, squares.sqrt())
    inverse = torch.where(faint, 0.0, 1 / lengths)
    return G.mul_(inverse).mul_(inverse[:, None]), lengths
