"""Arrays for the figures: shares and numbers, their smallest power of ten, and a selection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Smaller shares of the energy are rounding errors of float32.
LOWEST = 1e-9


def shares(energy: Sequence[float]) -> Floats:
    """Each energy as a share of the sum; NaN if the sum is zero.

    >>> shares([3.0, 1.0]), shares([0.0])
    (array([0.75, 0.25]), array([nan]))
    """
    values = np.asarray(energy, dtype=np.float64)
    total = values.sum()
    return values / total if 0 < total < np.inf else np.full(values.shape, np.nan)


def numbers(values: Iterable[float | None]) -> Floats:
    """An array with NaN for unknown values."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def floor(values: Floats) -> float:
    """The power of ten below all positive values, at least `LOWEST`.

    >>> floor(np.array([0.5, 0.02, 0.0])), floor(np.array([0.5, 1e-30])), floor(np.array([np.nan]))
    (0.01, 1e-09, 0.1)
    """
    positive = values[values > 0]
    least = max(float(positive.min(initial=0.5)), LOWEST)
    return float(10.0 ** np.floor(np.log10(least) + 1e-9))


def thinned(count: int, most: int) -> list[int]:
    """Every n-th of `count` positions from 0, at most `most` of them.

    >>> thinned(5, 10), thinned(10, 4)
    ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, count, max(1, -(-count // most))))
