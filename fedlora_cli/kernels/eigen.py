"""The leading eigenvectors of a symmetric, positive semi-definite matrix in float64."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fedlora_cli.kernels import subspace
from fedlora_cli.kernels.leading import Unresolved, orthonormal, solvable

#: Beyond this size the leading part is iterated for; below it, LAPACK is faster.
WHOLE = 1000

#: Below this many times the eigenvectors wanted, a whole decomposition in float64 costs no more.
FEW = 4

#: Products with the matrix after which LAPACK would have been done, at `WHOLE`.
LIMIT = 40

#: How far iterated eigenvectors may be from the best, in K itself, where their residual is 1e-13.
NEAR = 1e-9

#: Entries below this share of the largest are left out in float32, where they would underflow:
#: LAPACK does not get on with what is left of them.
FAINT = 1e-20

#: Refinements after which LAPACK in float64 would have been done: each takes a tenth of its time.
STEPS = 3


def top(K: Tensor, rank: int, error: float) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues, descending, and their eigenvectors (S, rank).

    Of an update whose squared singular values these are, the eigenvectors may move `error` ‖ΔW‖_F.
    """
    S = K.shape[0]
    found = None
    if S > WHOLE:
        found = _iterated(K, rank)
    elif FEW * (rank + subspace.SPARE) < S:
        found = _refined(K, rank, error)
    if found is not None:
        return found
    with solvable():
        values, vectors = torch.linalg.eigh(K)
    return values[-rank:].flip(0), vectors[:, -rank:].flip(1)


def values(K: Tensor, precision: torch.dtype) -> Tensor:
    """All eigenvalues, descending, in float64: found in `precision`, which is half the time in
    float32.
    """
    scale = K.diagonal().max()
    if precision == torch.float64 or not bool(scale > 0.0):
        scale, precision = torch.ones_like(scale), torch.float64
    with solvable():
        found: Tensor = torch.linalg.eigvalsh(_clear(K / scale).to(precision)).double()
    return found.flip(0) * scale


def _clear(K: Tensor) -> Tensor:
    """Without entries that underflow in float32."""
    return torch.where(K.abs() < FAINT, 0.0, K)


def _iterated(K: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """By subspace iteration; None where the spectrum is too flat for it."""
    operator = subspace.Operator(
        shape=(K.shape[0], K.shape[0]),
        apply=lambda V: K @ V,
        adjoint=lambda U: K @ U,
        energy=float(K.square().sum()),
        like=K,
    )
    with contextlib.suppress(Unresolved):
        found = subspace.leading(operator, rank, 1e-13, LIMIT, NEAR)
        if found.s.numel() == rank:
            return found.s, found.Vh.T
    return None


def _refined(K: Tensor, rank: int, error: float) -> tuple[Tensor, Tensor] | None:
    """By LAPACK in float32, which takes half the time, and a few steps of refinement in float64.

    Of the leading eigenvectors p_i with a few to spare, the part K p_i - θ_i p_i that is left
    belongs to the others, q_j; to first order p_i lacks (q_jᵀ K p_i) / (θ_i - λ_j) of them. A
    product with K then damps what the rounding of the q_j leaves, where the spectrum falls steeply.
    None where what is left in the end is still too much.
    """
    scale = float(K.diagonal().max())
    if not scale > 0.0:
        return None
    try:
        with solvable():
            rough, Q = torch.linalg.eigh(_clear(K / scale).float())
    except Unresolved:
        return None
    wide = rank + subspace.SPARE
    others, beyond = Q[:, :-wide].double(), rough[:-wide, None].double() * scale
    P = orthonormal(Q[:, -wide:].double())[0]
    values, P, left = _ritz(K, P)
    for _ in range(STEPS):
        P = orthonormal(K @ (P + others @ ((others.T @ left) / (values - beyond))))[0]
        values, P, left = _ritz(K, P)
        gaps = values[:rank] - beyond[-1]
        angles = torch.linalg.vector_norm(left[:, :rank], dim=0) / gaps
        moved = (values[:rank] * angles.square()).sum()
        # Not `>`: a spectrum without any gap has no angles either.
        if bool((gaps > 0).all()) and bool(moved <= error**2 * K.trace()):
            return values[:rank], P[:, :rank]
    return None


def _ritz(K: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of K in the space of P, descending, their vectors, and K p_i - θ_i p_i."""
    image = K @ P
    values, turned = torch.linalg.eigh(P.T @ image)
    values, turned = values.flip(0), turned.flip(1)
    P, image = P @ turned, image @ turned
    return values, P, image - P * values
