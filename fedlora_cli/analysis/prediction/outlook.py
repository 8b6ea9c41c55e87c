"""The verdict on a method in a round to come, by the thresholds of `fedlora diagnose`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlora_cli.analysis.decay import gamma
from fedlora_cli.analysis.diagnosis.verdict import VERDICTS, judge
from fedlora_cli.methods.weights import FloatArray, IntArray


def outlook(
    bounds: IntArray, energies: FloatArray, factors: FloatArray, last: int
) -> dict[str, Any]:
    """The verdict, reason, rank and κ of a `MethodForecast` in the round `last`.

    Without training, the clients bring what round 0 had, so κ is the share beyond a rank over that
    of round 0. Each rank but the largest gives a verdict: the worst counts, and of equal verdicts
    that of the lowest rank. Arrays have the shape (P,). Empty if all ranks are equal.
    """
    found = []
    for shared, rank in enumerate(bounds[:-1].tolist(), start=1):
        left = kept(energies, factors, shared, last)
        rate = left[-1] / left[-2] if left[-2] > 0 else None
        verdict, reason = judge(left, rate, gamma(factors, shared), rank)
        found.append({"verdict": verdict, "reason": reason, "beyond": rank, "kept": left[-1]})
    return max(found, key=lambda each: VERDICTS.index(each["verdict"]), default={})


def kept(energies: FloatArray, factors: FloatArray, shared: int, last: int) -> list[float]:
    """κ beyond the first `shared` partitions, from round 0 to round `last`.

    >>> kept(np.array([1.0, 1.0]), np.array([1.0, 0.5]), shared=1, last=1)
    [1.0, 0.6666666666666666]
    """
    # Divided by the largest factor, some energy always stays positive.
    rounds = np.arange(last + 1)[:, None]
    left = energies * (factors / factors.max()) ** rounds
    beyond = left[:, shared:].sum(axis=1) / left.sum(axis=1)
    values: list[float] = np.minimum(1.0, beyond / beyond[0]).tolist()
    return values
