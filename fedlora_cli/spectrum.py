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
