"""Pure functions of the singular values `s` of an update. Energy is s²."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def energy(s: FloatArray) -> float:
    """sum_i s_i², the squared Frobenius norm of the update.

    >>> energy(np.array([3.0, 1.0]))
    10.0
    """
    return float(np.square(s).sum())


def energy_ratio(spectra: Sequence[FloatArray], rank: int) -> float:
    """ρ_r = (energy in the first r directions) / (all energy), pooled over modules.

    The energy of each module's first r directions is summed before dividing. Not a number if there
    is no energy at all. Source: arXiv:2602.13486, where ρ at the shared rank shows the collapse.

    >>> energy_ratio([np.array([3.0, 1.0])], rank=1)
    0.9
    """
    total = sum(energy(s) for s in spectra)
    return sum(energy(s[:rank]) for s in spectra) / total if total > 0 else float("nan")


def rank_for_energy(s: FloatArray, fraction: float) -> int:
    """The smallest number of leading directions that hold `fraction` of the energy.

    0 where there is no energy at all.

    >>> rank_for_energy(np.array([3.0, 1.0]), 0.9), rank_for_energy(np.array([3.0, 1.0]), 0.91)
    (1, 2)
    """
    if s.size == 0 or s[0] == 0.0:
        return 0
    # Relative to the first, because the square of a tiny number may be no number at all.
    cumulative = np.cumsum(np.square(s / s[0]))
    # The last entry is exactly the total, so fraction 1 never asks for more than there is.
    return int(np.searchsorted(cumulative, fraction * cumulative[-1]) + 1)


def pooled_energy(spectra: Sequence[FloatArray]) -> FloatArray:
    """Energy by rank index, summed over modules: sum_m s_m[i]². Shape (the longest,).

    >>> pooled_energy([np.array([3.0, 1.0]), np.array([2.0])])
    array([13.,  1.])
    """
    total = np.zeros(max((s.size for s in spectra), default=0))
    for s in spectra:
        total[: s.size] += np.square(s)
    return total


def mean_share(
    energies: Sequence[Sequence[float]], samples: Sequence[float], first: int, last: int | None
) -> float | None:
    """The share of their own energy that clients have in rank indices first..last - 1, averaged by
    samples, or evenly if there are none. None if nobody has any energy.

    >>> mean_share([[3.0, 1.0], [1.0, 1.0], [0.0]], samples=[30, 10, 5], first=1, last=None)
    0.3125
    """
    found = [(e, n) for e, n in zip(energies, samples, strict=True) if sum(e) > 0]
    if not found:
        return None
    shares = [sum(e[first:last]) / sum(e) for e, _ in found]
    counts = [n for _, n in found]
    return float(np.average(shares, weights=counts if any(counts) else None))


def effective_rank(s: FloatArray) -> float:
    """exp(-sum_i p_i ln p_i) with p_i = s_i / sum s: how many directions there seem to be.

    From 1 to the number of directions; 0 without any. Source: Roy and Vetterli, EUSIPCO 2007.

    >>> round(effective_rank(np.array([1.0, 1.0, 1.0])), 12), effective_rank(np.zeros(0))
    (3.0, 0.0)
    """
    p = s[s > 0] / s.sum() if s.any() else np.zeros(0)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def stable_rank(s: FloatArray) -> float:
    """‖ΔW‖_F² / ‖ΔW‖_2² = sum s² / s_1²; 0 without any energy.

    Source: Rudelson and Vershynin, J. ACM 54 (2007).

    >>> stable_rank(np.array([2.0, 1.0])), stable_rank(np.zeros(3))
    (1.25, 0.0)
    """
    return float(np.square(s / s[0]).sum()) if s.any() else 0.0
