"""Rows for the comparison of arms: means and standard deviations over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora_cli.files.documents import read_object
from fedlora_cli.reports.simulate import ArmRow, RoundPoint, Spread
from fedlora_cli.simulation.course import course
from fedlora_cli.simulation.options import Arm, SimulateOptions
from fedlora_cli.simulation.places import DIAGNOSIS, Run

#: The metrics of the rounds of a run.
RunMetrics = list[dict[str, Any]]


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and sample standard deviation of the values that are not None.

    >>> spread([1.0, 3.0, None])
    Spread(mean=2.0, sd=1.4142135623730951)
    """
    known = [value for value in values if value is not None]
    return Spread(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
    )


def arm_rows(root: Path, options: SimulateOptions) -> tuple[ArmRow, ...]:
    """A row for each arm at each rate; the best rate of each arm is marked."""
    rows: list[ArmRow] = []
    for arm in options.arms:
        own = [_row(root, arm, rate, options) for rate in options.rates]
        best = min(own, key=_rank)
        rows += [replace(row, best=row is best) for row in own]
    return tuple(rows)


def _rank(row: ArmRow) -> tuple[int, float, float]:
    """A sort key, best rate first: fewer diverged runs, better validation, smaller rate."""
    return len(row.diverged), -(row.validation.mean or 0.0), row.rate


def _row(root: Path, arm: Arm, rate: float, options: SimulateOptions) -> ArmRow:
    runs = [Run(arm, rate, seed) for seed in options.seeds]
    courses = [list(course(root, run, options.rounds)) for run in runs]
    whole = [rounds for rounds in courses if not rounds[-1]["diverged"]]
    last = [rounds[-1] for rounds in whole]
    diagnoses = [
        read_object(run.folder(root) / DIAGNOSIS)
        for run, rounds in zip(runs, courses, strict=True)
        if not rounds[-1]["diverged"]
    ]
    every = [point for rounds in whole for point in rounds]
    return ArmRow(
        arm=arm.name,
        method=arm.method,
        quorum=arm.quorum,
        momentum=arm.momentum,
        rate=rate,
        best=False,
        runs=len(runs),
        diverged=tuple(len(rounds) for rounds in courses if rounds[-1]["diverged"]),
        accuracy=_over(last, "accuracy"),
        validation=_over(last, "validation"),
        energy_ratio=_over(last, "energy_ratio"),
        effective_rank=spread(one["adapters"][-1]["effective_rank"] for one in diagnoses),
        norm=_over(last, "norm"),
        gamma=spread(one["trend"]["gamma"] for one in diagnoses if one["trend"]),
        verdicts=tuple(one["verdict"] for one in diagnoses),
        bytes_up=_mean(every, "bytes_up"),
        bytes_down=_mean(every, "bytes_down"),
        server_seconds=_mean(every, "server_seconds"),
        client_seconds=_mean(every, "client_seconds"),
        rounds=tuple(_point(whole, number) for number in range(options.rounds) if whole),
        folders=tuple(str(run.folder(root)) for run in runs),
        by_seed=tuple(
            None if rounds[-1]["diverged"] else rounds[-1].get("accuracy") for rounds in courses
        ),
    )


def _point(courses: Sequence[RunMetrics], index: int) -> RoundPoint:
    at = [rounds[index] for rounds in courses]
    return RoundPoint(
        round=index + 1,
        # Only if all seeds have a score in this round.
        accuracy=_over(at if all("accuracy" in one for one in at) else (), "accuracy"),
        energy_ratio=_over(at, "energy_ratio"),
        norm=_over(at, "norm"),
    )


def _over(rounds: Sequence[Mapping[str, Any]], name: str) -> Spread:
    return spread(one.get(name) for one in rounds)


def _mean(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(one[name] for one in rounds) if rounds else 0.0
