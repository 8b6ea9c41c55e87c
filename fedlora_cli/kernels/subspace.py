"""Leading singular directions by subspace iteration, with a measured error.

Random start and oversampling as in Halko, Martinsson and Tropp (arXiv:0909.4061). Chebyshev filters
between the Rayleigh-Ritz steps (Zhou, Saad, Tiago and Chelikowsky 2006), because a spectrum that
decays slowly would take hundreds of plain steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.kernels.cost import SMALL, SPARE
from fedlora_cli.kernels.leading import (
    Leading,
    Unresolved,
    nothing,
    oriented,
    orthonormal,
    ritz,
    solvable,
)

#: Largest number of products with ΔW or ΔWᵀ.
LIMIT = 120

#: The iteration ends early if its forecast exceeds the limit this many times.
PATIENCE = 2

#: Largest degree of a filter between two Rayleigh-Ritz steps.
DEGREE = 12

#: Largest ratio of a filter's gains for the first and the last direction, times eps. At 1, the last
#: direction would be lost in the rounding of the first; this value leaves 1.5 digits.
SPREAD = 0.03


@dataclass(frozen=True, eq=False)
class Operator:
    """ΔW (out, in) as two functions, with its energy ‖ΔW‖_F².

    `apply` maps V (in, p) to ΔW V, `adjoint` maps U (out, p) to ΔWᵀ U, both in the dtype and on the
    device of `like`.
    """

    shape: tuple[int, int]
    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    energy: float
    like: Tensor


@solvable()
def leading(
    operator: Operator,
    rank: int,
    tolerance: float,
    limit: int = LIMIT,
    near: float | None = None,
) -> Leading:
    """The leading `rank` directions. Raises Unresolved.

    Their residual is at most `tolerance` · ‖ΔW‖_F, and their distance from the best approximation
    at most `near` · ‖ΔW‖_F; `near` is `tolerance` if None. In a flat spectrum the distance is the
    stricter bound. For singular values without directions, pass infinity.

    Directions with s <= eps · ‖ΔW‖_F are rounding, and are left out. The random start has a fixed
    seed.
    """
    rank = min(rank, *operator.shape)
    norm = math.sqrt(max(operator.energy, 0.0))
    if norm == 0.0 or rank == 0:
        return nothing(operator.shape, operator.like)
    eps = torch.finfo(operator.like.dtype).eps
    V, used, whole = _start(operator, rank)
    history: list[tuple[int, float]] = []
    while True:
        U, s, V = ritz(V, operator.apply(V))
        image = operator.adjoint(U)
        used += 2
        kept = int((s[:rank] > eps * norm).sum())
        rest = image[:, :kept] - V[:, :kept] * s[:kept].to(V)
        residual = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
        distance = _distance(s, kept, rest, eps * norm, whole=whole)
        error = residual
        if near != math.inf:
            error = max(residual, distance * tolerance / (near or tolerance))
        if error <= tolerance * norm:
            return oriented(U[:, :kept], s[:kept], V[:, :kept], operator.energy, residual)
        history.append((used, error / norm))
        if whole or _hopeless(history, tolerance, limit):
            raise Unresolved(f"an error of {history[-1][1]:.1e} after {used} products")
        V, degree = _filtered(operator, V, s, image, (limit - used) // 2)
        used += 2 * (degree - 1)


def _distance(s: Tensor, kept: int, rest: Tensor, rounding: float, *, whole: bool) -> float:
    """An estimate of the distance of the leading `kept` directions from the best approximation.

    In the Frobenius norm and to first order, direction i lacks s_i ‖rest_i‖ / (s_i² - a) of the
    directions outside the basis, where a is the square of the last Ritz value. Rounding also mixes
    the last kept direction with the next direction, more so the smaller the gap between them.
    """
    if kept == 0:
        return 0.0
    squares = s[:kept].square()
    moved = s.new_zeros(kept)
    if not whole:
        gaps = (squares - (s[-1] ** 2 if kept < s.numel() else 0.0)).clamp(min=0.0)
        moved = squares * torch.linalg.vector_norm(rest, dim=0, dtype=torch.float64) / gaps
    following = float(s[kept]) if kept < s.numel() else 0.0
    last = float(s[kept - 1])
    mixed = math.inf if last <= following else rounding * last / (last - following)
    return math.hypot(float(torch.linalg.vector_norm(moved)), mixed)


def _hopeless(history: list[tuple[int, float]], tolerance: float, limit: int) -> bool:
    """Whether the limit is reached, or will be exceeded by far at the pace of the last two steps.

    `history` holds the products used and the relative residual after each step. The first two steps
    are not representative.
    """
    used, residual = history[-1]
    if used + 2 > limit or not math.isfinite(residual):
        return True
    if len(history) < 4:
        return False
    earlier, larger = history[-3]
    if residual >= larger:
        return True
    pace = math.log(larger / residual) / (used - earlier)
    return used + math.log(residual / tolerance) / pace > PATIENCE * limit


def _start(operator: Operator, rank: int) -> tuple[Tensor, int, bool]:
    """A first basis (in, p), the number of products it took, and whether it is the whole space."""
    out_features, in_features = operator.shape
    side = min(operator.shape)
    columns = rank + SPARE
    if side <= max(SMALL, columns):
        identity = torch.eye(side, dtype=operator.like.dtype, device=operator.like.device)
        if side == in_features:
            return identity, 0, True
        return orthonormal(operator.adjoint(identity))[0], 1, True
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(out_features, columns, generator=generator).to(operator.like)
    return orthonormal(operator.adjoint(orthonormal(U)[0]))[0], 1, False


def _filtered(
    operator: Operator, V: Tensor, s: Tensor, image: Tensor, most: int
) -> tuple[Tensor, int]:
    """An orthonormal basis of T_m(2 ΔWᵀΔW / a - 1) V, and the degree m <= `most`.

    a = s_p² is the square of the last Ritz value. The Chebyshev polynomial T_m stays within ±1 on
    [0, a] and grows as fast as a polynomial can beyond. `image` is ΔWᵀU, so ΔWᵀΔW V = image · s
    takes no product.
    """
    edge = float(s[-1]) ** 2
    degree = min(most, _degree(float(s[0]) ** 2, edge, torch.finfo(V.dtype).eps))
    squared = image * s.to(image)
    if degree == 1:
        return orthonormal(squared)[0], 1
    before, now = V, (2 / edge) * squared - V
    for _ in range(degree - 1):
        following = (4 / edge) * operator.adjoint(operator.apply(now)) - 2 * now - before
        before, now = now, following
    return orthonormal(now)[0], degree


def _degree(largest: float, edge: float, eps: float) -> int:
    """The largest degree m whose gain, cosh(m arcosh(2 s_1² / a - 1)), is at most SPREAD / eps."""
    if edge <= eps * largest:
        return 1
    rate = math.acosh(max(2 * largest / edge - 1, 1.0))
    bound = math.acosh(SPREAD / eps)
    return max(1, min(DEGREE, int(bound / max(rate, 1e-3))))
