"""The median that all thresholds for suspicious clients use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora_cli.methods.weights import FloatArray


def lower_median(values: Sequence[float] | FloatArray) -> float:
    """The lower median of the values above 0; 0 without any.

    Lower, because the larger of two middle values may come from an attacker.
    """
    array = np.asarray(values, dtype=np.float64)
    positive = np.sort(array[array > 0])
    return float(positive[(positive.size - 1) // 2]) if positive.size else 0.0
