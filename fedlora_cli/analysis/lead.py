"""Whether the best arm of a simulation leads by more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedlora_cli.reports.simulate import ArmRow, Lead

#: The fewest seeds from which a standard deviation is estimated.
_LEAST_SEEDS = 3

#: Two-sided 95 % quantiles: normal, and Student's t by degrees of freedom from 1.
_NORMAL = 1.96
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def lead(arms: Sequence[ArmRow], examples: int) -> Lead | None:
    """The best arm compared with the second, from arms at their best rates and the number of test
    examples. None for fewer than two arms with an accuracy.

    An arm with fewer diverged runs is better; the accuracy decides among equals.
    """
    known = [row for row in arms if row.accuracy.mean is not None]
    if len(known) < 2:
        return None
    first, second, *_ = sorted(
        known, key=lambda row: (len(row.diverged), -(row.accuracy.mean or 0))
    )
    points, margin, seeds = difference(first, second, examples)
    significant = margin is not None and points > margin
    return Lead(first.arm, second.arm, points, margin, seeds, significant)


def difference(first: ArmRow, second: ArmRow, examples: int) -> tuple[float, float | None, int]:
    """The lead in accuracy of the first arm, its 95 % margin, and the number of seeds behind both.

    Runs are paired by seed, because a seed gives both arms the same training examples. All seeds
    share the test examples, so the margin is at least that of two shares of `examples`. It is None
    for fewer than three pairs.
    """
    pairs = [
        (a, b)
        for a, b in zip(first.by_seed, second.by_seed, strict=False)
        if a is not None and b is not None
    ]
    if len(pairs) < _LEAST_SEEDS:
        return (first.accuracy.mean or 0) - (second.accuracy.mean or 0), None, len(pairs)
    differences = [a - b for a, b in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    shares = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    sampled = math.sqrt(sum(share * (1 - share) for share in shares) / examples)
    margin = max(_student(len(pairs) - 1) * error, _NORMAL * sampled)
    return statistics.fmean(differences), margin, len(pairs)


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; beyond the table, an approximation.

    >>> _student(2), round(_student(30), 2)
    (4.3, 2.04)
    """
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL + 2.5 / freedom
