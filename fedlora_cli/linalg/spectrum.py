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


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def energy_ratio(spectra: Sequence[FloatArray], rank: int) -> float:
    """ρ_r = (energy in the first r directions) / (all energy), pooled over modules.

    Energies are summed over the modules before dividing. NaN if there is no energy. Source:
    arXiv:2602.13486, where ρ at the shared rank shows the collapse.

    >>> energy_ratio([np.array([3.0, 1.0])], rank=1)
    0.9
    """
    total = sum(energy(s) for s in spectra)
    return sum(energy(s[:rank]) for s in spectra) / total if total > 0 else float("nan")


def rank_for_energy(s: FloatArray, fraction: float) -> int:
    """The smallest number of leading directions that hold `fraction` of the energy; 0 without any.

    >>> rank_for_energy(np.array([3.0, 1.0]), 0.9), rank_for_energy(np.array([3.0, 1.0]), 0.91)
    (1, 2)
    """
    if s.size == 0 or s[0] == 0.0:
        return 0
    # Relative to the first, because the square of a tiny number may underflow.
    cumulative = np.cumsum(np.square(s / s[0]))
    # Relative to the last entry, so that rounding cannot make a fraction of 1 unreachable.
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
    """The mean over clients of the share of their energy in rank indices first..last - 1.

    Weighted by samples, or evenly if there are none. None if no client has any energy.

    >>> mean_share([[3.0, 1.0], [1.0, 1.0], [0.0]], samples=[30, 10, 5], first=1, last=None)
    0.3125
    """
    nonzero = [(e, n) for e, n in zip(energies, samples, strict=True) if sum(e) > 0]
    if not nonzero:
        return None
    shares = [sum(e[first:last]) / sum(e) for e, _ in nonzero]
    counts = [n for _, n in nonzero]
    return float(np.average(shares, weights=counts if any(counts) else None))


def effective_rank(s: FloatArray) -> float:
    """exp(-sum_i p_i ln p_i) with p_i = s_i / sum s: the effective number of directions.

    From 1 to the number of directions; 0 without energy. Source: Roy and Vetterli, EUSIPCO 2007.

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
