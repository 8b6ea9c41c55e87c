"""The size of an update, correct also if its pieces cancel, and the faults that it shows.

tr((BᵀB)(AAᵀ)) is ‖ΔW‖², but with the rounding of the rank-one pieces b_i a_i, which may be far
larger than the update. So it is used only if the pieces are about as large as the update. Otherwise
B = Q L and Aᵀ = P R by Householder's QR, whose rounding is relative to each column, and
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

#: Largest ratio of the pieces of an update to the update. Float32 factors have an error of 6e-8, so
#: beyond this a tenth of the update is rounding. Adapters trained from random factors have a ratio
#: of 1 to 10. After one step at a learning rate of 1e-3 it is 600 for adapters converted from PiSSA
#: and 90 for an orthogonal start; at 1e-5, 100 times that.
CANCELLED = 1e6

#: Largest norm whose squares, summed over modules, stay in the range of float64.
LARGEST = 1e150

#: Lengths of columns whose products stay in the range of float64.
RANGE = (1e-150, 1e150)

#: Largest ratio of pieces to update at which Gram matrices give the norm: within 1e-6 in float64,
#: within 1 % in float32.
CLOSE = {torch.float64: 1e3, torch.float32: 30.0}


@dataclass(frozen=True)
class Sizes:
    """Sizes of ΔW; infinite if products leave the range of float64.

    - `norm`: ‖ΔW‖_F. `pieces`: sum_i ‖b_i‖ ‖a_i‖.
    - `part`: the largest norm of the rank indices from any of the given indices on.
    """

    norm: float
    part: float
    pieces: float

    @property
    def reach(self) -> float:
        """A bound, up to a factor of two, on the update under weights in [0, 1] that grow with the
        rank index: its norm, or half of its largest part.

        Such weights may undo the cancellation between parts. Half, because parts that are merely
        not orthogonal are no fault.
        """
        return max(self.norm, self.part / 2)

    def __mul__(self, factor: float) -> Sizes:
        return Sizes(self.norm * factor, self.part * factor, self.pieces * factor)


def sizes(
    updates: Sequence[Factors], starts: Sequence[int] = (0,), precision: torch.dtype = torch.float64
) -> list[Sizes]:
    """The sizes of updates whose parts begin at the rank indices `starts`, ascending from 0.

    In float32, norms are within 1 %, and faults are found as surely as in float64.
    """
    pairs = [(update.B, update.A) for update in updates]
    # The square of a small float64 column may be 0, so float64 goes to `_exact`.
    quick = [i for i, (B, A) in enumerate(pairs) if torch.float64 not in (B.dtype, A.dtype)]
    known: dict[int, Sizes | None] = {}
    if quick:
        figures = torch.stack([_by_grams(updates[i], starts, precision) for i in quick])
        for i, row in zip(quick, figures.tolist(), strict=True):
            known[i] = _known(row, updates[i].scale, CLOSE[precision])
    return [known.get(i) or _exact(update, starts) for i, update in enumerate(updates)]


def norm(factors: Factors) -> float:
    """‖ΔW‖_F; infinite if products leave the range of float64.

    >>> norm(Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]]), scale=0.5))
    5.0
    """
    return sizes([factors])[0].norm


def fault(adapter: object, module: str, measured: Sizes) -> InputError | None:
    """The fault that the sizes of an update show, or None.

    >>> fault("round-01/ann", "q_proj", Sizes(1.0, 1.0, 2e6)).found
    'the pieces of the update of q_proj cancel: their norms add up to 2e+06, the update has 1'
    """
    if not measured.reach <= LARGEST:  # true for NaN
        return without_norm(adapter, module)
    if not measured.pieces <= CANCELLED * measured.norm:
        sums = f"their norms add up to {measured.pieces:.3g}, the update has {measured.norm:.3g}"
        found = f"the pieces of the update of {module} cancel: {sums}"
        return InputError(adapter, found, "leave this adapter out, or train it further")
    return None


def _by_grams(factors: Factors, starts: Sequence[int], precision: torch.dtype) -> Tensor:
    """Six figures in float64, without the scale, shape (6,): 1 if all squares are in range, the
    largest ‖b_i‖, the largest ‖a_i‖, ‖ΔW‖², the square of the largest part, the sum of the pieces.
    """
    B, A = factors.B.to(precision), factors.A.to(precision)
    G_B, G_A = B.T @ B, A @ A.T
    least = torch.finfo(precision).tiny / torch.finfo(precision).eps
    inside = torch.ones((), dtype=torch.bool, device=B.device)
    if precision == torch.float32:  # in float64, its squares are always in range
        for G, X, dim in ((G_B, B, 0), (G_A, A, 1)):
            inside = inside & ((G.diagonal() > least) | (X.abs().amax(dim) == 0)).all()
    b, a = (G.diagonal().double().sqrt() for G in (G_B, G_A))
    products = G_B.double() * G_A.double()
    whole, part = products.sum(), products.sum()
    if len(starts) > 1 and starts[1] < factors.rank:
        # The sum of everything at row and column j or later, for every j.
        from_end = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        part = from_end[[start for start in starts if start < factors.rank]].max()
    return torch.stack([inside.double(), b.max(), a.max(), whole, part, (b * a).sum()])


def _known(row: Sequence[float], scale: float, close: float) -> Sizes | None:
    """The sizes from the figures of `_by_grams`, or None if they are not reliable."""
    inside, b, a, whole, part, pieces = row
    if not (inside and _in_range(b * abs(scale), a) and math.isfinite(part)):
        return None
    if not pieces**2 <= close**2 * whole:
        return None
    return Sizes(math.sqrt(whole), math.sqrt(max(part, whole)), pieces) * abs(scale)


def _exact(factors: Factors, starts: Sequence[int]) -> Sizes:
    """The sizes by QR, with each column scaled to a largest entry of 1."""
    B, A = factors.B.double(), factors.A.double()
    b, a = B.abs().amax(dim=0), A.abs().amax(dim=1)
    scaled = b * abs(factors.scale)
    kept = ((scaled > 0) & (a > 0)).nonzero()[:, 0]
    limits = [value for side in (b[kept], scaled[kept], a[kept]) for value in side.tolist()]
    finite = bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())
    if not (finite and _in_range(*limits)):
        return Sizes(math.inf, math.inf, math.inf)
    if kept.numel() == 0:
        return Sizes(0.0, 0.0, 0.0)
    weights = scaled[kept] * a[kept]
    top = float(weights.max())
    B, A = B[:, kept] / b[kept], A[kept] / a[kept, None]
    length = torch.linalg.vector_norm
    pieces = weights / top * length(B, dim=0) * length(A, dim=1)
    L = torch.linalg.qr(B, mode="r")[1] * (weights / top)
    R = torch.linalg.qr(A.T, mode="r")[1].T
    places = torch.searchsorted(kept, torch.tensor(starts, device=kept.device)).tolist()
    norms = _norms_from(places, L, R)
    return Sizes(norms[0], max(norms), float(pieces.sum())) * top


def _norms_from(places: Sequence[int], L: Tensor, R: Tensor) -> list[float]:
    """‖L[:, j:] R[j:]‖_F for each j of `places`, ascending."""
    total = L.new_zeros(L.shape[0], R.shape[1])
    norms = []
    for first, stop in reversed([*pairwise([*places, R.shape[0]])]):
        total.addmm_(L[:, first:stop], R[first:stop])
        norms.append(float(torch.linalg.vector_norm(total)))
    return norms[::-1]


def _in_range(*values: float) -> bool:
    """Whether each length is 0 or in `RANGE`, so that products are in the range of float64."""
    return all(value == 0 or RANGE[0] <= value <= RANGE[1] for value in values)
