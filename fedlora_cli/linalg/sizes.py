"""How large an update is, in figures that hold where its pieces cancel, and which updates are at
fault for that.

tr((BᵀB)(AAᵀ)) is ‖ΔW‖² by subtraction: its rounding goes by the rank-one pieces b_i a_i, not by
what is left of them. So it counts only where the pieces are about as large as the update.
Elsewhere B = Q L and Aᵀ = P R by Householder's QR, whose rounding is relative to every column, and
‖ΔW‖ = ‖L Rᵀ‖ within 1e-13 of the sum of the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedlora_cli.errors import InputError, without_norm
from fedlora_cli.linalg.factors import Factors

#: How many times larger than their sum the pieces of an update may be. Float32 factors know their
#: pieces to 6e-8: beyond this, a tenth of the update is rounding. Adapters that were trained from
#: random factors have 1 to 10. After one step at a learning rate of 1e-3, 600 where they are a
#: difference, converted from PiSSA, and 90 from an orthogonal start; 100 times that at 1e-5.
CANCELLED = 1e6

#: The norm beyond which squares, and their sums over modules, leave the range of float64.
LARGEST = 1e150

#: The range of a factor's columns in which all products of them stay in that of float64.
RANGE = (1e-150, 1e150)

#: How far pieces may exceed their sum where Gram matrices tell its norm: then within 1e-6 where
#: they are in float64, within 1 % in float32.
CLOSE = {torch.float64: 1e3, torch.float32: 30.0}


@dataclass(frozen=True)
class Sizes:
    """Sizes of ΔW: `norm` is ‖ΔW‖_F, `part` the largest norm of its rank indices from some index
    on, `pieces` is sum_i ‖b_i‖ ‖a_i‖. All are infinite where products leave the range of float64.
    """

    norm: float
    part: float
    pieces: float

    @property
    def reach(self) -> float:
        """How large the update can become under weights in [0, 1] that grow with the rank index,
        up to a factor of two: its norm, or half of its largest part.

        With weights by rank index, parts that cancel each other no longer do. The half leaves
        alone what merely is not orthogonal.
        """
        return max(self.norm, self.part / 2)

    def __mul__(self, factor: float) -> Sizes:
        return Sizes(self.norm * factor, self.part * factor, self.pieces * factor)


def sizes(
    updates: Sequence[Factors], starts: Sequence[int] = (0,), precision: torch.dtype = torch.float64
) -> list[Sizes]:
    """The sizes of these updates, whose parts begin at the rank indices `starts`, ascending from 0.

    In float32, norms are within 1 %; `norm` and `pieces` tell faults as surely as in float64.
    """
    # A float64 column may be so small that its square is 0: that is for `_exact`.
    quick = [i for i, one in enumerate(updates) if torch.float64 not in (one.B.dtype, one.A.dtype)]
    found: dict[int, Sizes] = {}
    if quick:
        figures = torch.stack([_by_grams(updates[i], starts, precision) for i in quick])
        for i, row in zip(quick, figures.tolist(), strict=True):
            known = _known(row, updates[i].scale, CLOSE[precision])
            if known is not None:
                found[i] = known
    return [found[i] if i in found else _exact(one, starts) for i, one in enumerate(updates)]


def norm(factors: Factors) -> float:
    """‖ΔW‖_F; infinite where products leave the range of float64.

    >>> norm(Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]]), scale=0.5))
    5.0
    """
    return sizes([factors])[0].norm


def fault(adapter: object, module: str, found: Sizes) -> InputError | None:
    """What is wrong with an update of these sizes, if anything.

    >>> fault("round-01/ann", "q_proj", Sizes(1.0, 1.0, 2e6)).found
    'the pieces of the update of q_proj cancel: their norms add up to 2e+06, the update has 1'
    """
    if not found.reach <= LARGEST:  # nor where it is not a number
        return without_norm(adapter, module)
    if not found.pieces <= CANCELLED * found.norm:
        what = f"their norms add up to {found.pieces:.3g}, the update has {found.norm:.3g}"
        found_there = f"the pieces of the update of {module} cancel: {what}"
        return InputError(adapter, found_there, "leave this adapter out, or train it further")
    return None


def _by_grams(factors: Factors, starts: Sequence[int], precision: torch.dtype) -> Tensor:
    """Without the scale: 1 if all squares are in range, the largest ‖b_i‖ and ‖a_i‖, ‖ΔW‖² and that
    of the largest part, and the sum of the pieces. In float64, shape (6,).
    """
    B, A = factors.B.to(precision), factors.A.to(precision)
    G_B, G_A = B.T @ B, A @ A.T
    least = torch.finfo(precision).tiny / torch.finfo(precision).eps
    inside = [torch.ones((), dtype=torch.bool, device=B.device)] * 2
    if precision == torch.float32:  # no square of it is out of range in float64
        inside = [
            ((G.diagonal() > least) | (X.abs().amax(dim) == 0)).all()
            for G, X, dim in ((G_B, B, 0), (G_A, A, 1))
        ]
    b, a = (G.diagonal().double().sqrt() for G in (G_B, G_A))
    products = G_B.double() * G_A.double()
    whole, part = products.sum(), products.sum()
    if len(starts) > 1 and starts[1] < factors.rank:
        # The sum of everything at row and column j or later, for every j.
        from_end = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        part = from_end[[start for start in starts if start < factors.rank]].max()
    figures = [(inside[0] & inside[1]).double(), b.max(), a.max(), whole, part, (b * a).sum()]
    return torch.stack(figures)


def _known(row: Sequence[float], scale: float, close: float) -> Sizes | None:
    """What `_by_grams` found, or None where it does not tell."""
    inside, b, a, whole, part, pieces = row
    if not (inside and _in_range(b * abs(scale), a) and math.isfinite(part)):
        return None
    if not pieces**2 <= close**2 * whole:
        return None
    found = Sizes(math.sqrt(whole), math.sqrt(max(part, whole)), pieces)
    return found * abs(scale)


def _exact(factors: Factors, starts: Sequence[int]) -> Sizes:
    """Through QR, with every column scaled to a largest entry of 1."""
    B, A = factors.B.double(), factors.A.double()
    b, a = B.abs().amax(dim=0), A.abs().amax(dim=1)
    scaled = b * abs(factors.scale)
    held = ((scaled > 0) & (a > 0)).nonzero()[:, 0]
    limits = [value for side in (b[held], scaled[held], a[held]) for value in side.tolist()]
    finite = bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())
    if not (finite and _in_range(*limits)):
        return Sizes(math.inf, math.inf, math.inf)
    if held.numel() == 0:
        return Sizes(0.0, 0.0, 0.0)
    weights = scaled[held] * a[held]
    top = float(weights.max())
    B, A = B[:, held] / b[held], A[held] / a[held, None]
    length = torch.linalg.vector_norm
    pieces = weights / top * length(B, dim=0) * length(A, dim=1)
    L = torch.linalg.qr(B, mode="r")[1] * (weights / top)
    R = torch.linalg.qr(A.T, mode="r")[1].T
    places = torch.searchsorted(held, torch.tensor(starts, device=held.device)).tolist()
    norms = _norms_from(places, L, R)
    return Sizes(norms[0], max(norms), float(pieces.sum())) * top


def _norms_from(places: Sequence[int], L: Tensor, R: Tensor) -> list[float]:
    """‖L[:, j:] R[j:]‖_F for every j of `places`, ascending."""
    total = L.new_zeros(L.shape[0], R.shape[1])
    norms = []
    for first, stop in reversed([*pairwise([*places, R.shape[0]])]):
        total.addmm_(L[:, first:stop], R[first:stop])
        norms.append(float(torch.linalg.vector_norm(total)))
    return norms[::-1]


def _in_range(*values: float) -> bool:
    """Whether these lengths are 0, or neither too small nor too large to be multiplied."""
    return all(value == 0 or RANGE[0] <= value <= RANGE[1] for value in values)
