"""The leading eigenvectors of a symmetric, positive semi-definite matrix in float64."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fedlora_cli.kernels import subspace
from fedlora_cli.kernels.cost import SPARE, WHOLE
from fedlora_cli.kernels.leading import TOLERANCES, Unresolved, orthonormal, solvable

#: Size, in multiples of the wanted eigenvectors, up to which refinement is not faster than a whole
#: decomposition in float64.
FEW = 4

#: Products with the matrix that take as long as LAPACK at size `WHOLE`.
LIMIT = 40

#: Distance from the best eigenvectors that an iteration may have, relative to ‖K‖_F.
NEAR = 1e-9

#: Entries below this share of the largest are set to 0 in float32. They would become subnormal, and
#: LAPACK fails on such matrices.
FAINT = 1e-20

#: Largest number of refinements. Each takes a tenth of the time of LAPACK in float64.
STEPS = 3


def top(K: Tensor, rank: int, error: float) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues, descending, and their eigenvectors (S, rank).

    The eigenvalues are the squared singular values of an update ΔW. An error in the eigenvectors
    moves its truncation by at most `error` · ‖ΔW‖_F.
    """
    S = K.shape[0]
    fast = None
    if S > WHOLE:
        fast = _iterated(K, rank)
    elif FEW * (rank + SPARE) < S:
        fast = _refined(K, rank, error)
    if fast is not None:
        return fast
    with solvable():
        values, vectors = torch.linalg.eigh(K)
    return values[-rank:].flip(0), vectors[:, -rank:].flip(1)


def values(K: Tensor, precision: torch.dtype) -> Tensor:
    """All eigenvalues, descending, as float64; computed in `precision` (float32: half the time)."""
    scale = K.diagonal().max()
    if precision == torch.float64 or not bool(scale > 0.0):
        scale, precision = torch.ones_like(scale), torch.float64
    with solvable():
        ascending: Tensor = torch.linalg.eigvalsh(_clear(K / scale).to(precision)).double()
    return ascending.flip(0) * scale


def _clear(K: Tensor) -> Tensor:
    """K without the entries that would underflow in float32."""
    return torch.where(K.abs() < FAINT, 0.0, K)


def _iterated(K: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The result of `top` by subspace iteration; None if the spectrum is too flat."""
    operator = subspace.Operator(
        shape=(K.shape[0], K.shape[0]),
        apply=lambda V: K @ V,
        adjoint=lambda U: K @ U,
        energy=float(K.square().sum()),
        like=K,
    )
    with contextlib.suppress(Unresolved):
        top = subspace.leading(operator, rank, TOLERANCES["float64"], LIMIT, NEAR)
        if top.s.numel() == rank:
            return top.s, top.Vh.T
    return None


def _refined(K: Tensor, rank: int, error: float) -> tuple[Tensor, Tensor] | None:
    """The result of `top` by LAPACK in float32 (half the time) and refinement in float64.

    Let p_i be the leading eigenvectors with `SPARE` more, and q_j the others. The residual
    K p_i - θ_i p_i lies in the space of the q_j; to first order, p_i lacks
    (q_jᵀ K p_i) / (θ_i - λ_j) of q_j. A product with K then damps the rounding of the q_j if the
    spectrum falls steeply. None if the remaining error is above `error`.
    """
    scale = float(K.diagonal().max())
    if not scale > 0.0:
        return None
    try:
        with solvable():
            rough, Q = torch.linalg.eigh(_clear(K / scale).float())
    except Unresolved:
        return None
    wide = rank + SPARE
    others, beyond = Q[:, :-wide].double(), rough[:-wide, None].double() * scale
    P = orthonormal(Q[:, -wide:].double())[0]
    values, P, left = _ritz(K, P)
    for _ in range(STEPS):
        P = orthonormal(K @ (P + others @ ((others.T @ left) / (values - beyond))))[0]
        values, P, left = _ritz(K, P)
        gaps = values[:rank] - beyond[-1]
        angles = torch.linalg.vector_norm(left[:, :rank], dim=0) / gaps
        moved = (values[:rank] * angles.square()).sum()
        if bool((gaps > 0).all()) and bool(moved <= error**2 * K.trace()):
            return values[:rank], P[:, :rank]
    return None


def _ritz(K: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues θ of K in the space of P, descending, eigenvectors p, and K p_i - θ_i p_i."""
    image = K @ P
    values, turned = torch.linalg.eigh(P.T @ image)
    values, turned = values.flip(0), turned.flip(1)
    P, image = P @ turned, image @ turned
    return values, P, image - P * values
