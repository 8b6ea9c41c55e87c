"""Rows for the comparison of arms: means and standard deviations over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from fedlora_cli.files.documents import read_object
from fedlora_cli.reports.simulate import ArmRow, RoundPoint, RoundRow, Spread
from fedlora_cli.simulation.arm import Arm
from fedlora_cli.simulation.course import course
from fedlora_cli.simulation.options import SimulateOptions
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
        of_arm = [_row(root, arm, rate, options) for rate in options.rates]
        best = min(of_arm, key=_rank)
        rows += [replace(row, best=row is best) for row in of_arm]
    return tuple(rows)


def round_rows(root: Path, options: SimulateOptions) -> tuple[RoundRow, ...]:
    """A row for each finished round of each run: by arm, rate, seed and round."""
    runs = [
        Run(arm, rate, seed)
        for arm, rate, seed in product(options.arms, options.rates, options.seeds)
    ]
    return tuple(
        _round_row(run, metrics) for run in runs for metrics in course(root, run, options.rounds)
    )


def _round_row(run: Run, metrics: Mapping[str, Any]) -> RoundRow:
    return RoundRow(
        arm=run.arm.name,
        method=run.arm.method,
        quorum=run.arm.quorum,
        momentum=run.arm.momentum,
        learning_rate=run.rate,
        seed=run.seed,
        round=metrics["round"],
        clients=len(metrics["clients"]),
        diverged=metrics["diverged"] is not None,
        loss=metrics.get("loss"),
        validation_accuracy=metrics.get("validation"),
        accuracy=metrics.get("accuracy"),
        energy_ratio=metrics.get("energy_ratio"),
        norm=metrics.get("norm"),
        bytes_up=metrics.get("bytes_up"),
        bytes_down=metrics.get("bytes_down"),
        client_seconds=metrics.get("client_seconds"),
        server_seconds=metrics.get("server_seconds"),
    )


def _rank(row: ArmRow) -> tuple[int, float, float]:
    """A sort key, best rate first: fewer diverged runs, better validation, smaller rate."""
    return len(row.diverged), -(row.validation.mean or 0.0), row.rate


def _row(root: Path, arm: Arm, rate: float, options: SimulateOptions) -> ArmRow:
    runs = [Run(arm, rate, seed) for seed in options.seeds]
    courses = {run: list(course(root, run, options.rounds)) for run in runs}
    diverged = {run: len(rounds) for run, rounds in courses.items() if rounds[-1]["diverged"]}
    whole = [rounds for run, rounds in courses.items() if run not in diverged]
    last = [rounds[-1] for rounds in whole]
    folders = [run.folder(root) for run in runs if run not in diverged]
    diagnoses = [read_object(folder / DIAGNOSIS) for folder in folders]
    every = [point for rounds in whole for point in rounds]
    return ArmRow(
        arm=arm.name,
        method=arm.method,
        quorum=arm.quorum,
        momentum=arm.momentum,
        rate=rate,
        best=False,
        runs=len(runs),
        diverged=tuple(diverged.values()),
        accuracy=_over(last, "accuracy"),
        validation=_over(last, "validation"),
        energy_ratio=_over(last, "energy_ratio"),
        effective_rank=spread(report["adapters"][-1]["effective_rank"] for report in diagnoses),
        norm=_over(last, "norm"),
        gamma=spread(report["trend"]["gamma"] for report in diagnoses if report["trend"]),
        verdicts=tuple(report["verdict"] for report in diagnoses),
        bytes_up=_mean(every, "bytes_up"),
        bytes_down=_mean(every, "bytes_down"),
        server_seconds=_mean(every, "server_seconds"),
        client_seconds=_mean(every, "client_seconds"),
        rounds=tuple(_point(whole, number) for number in range(options.rounds) if whole),
        folders=tuple(str(run.folder(root)) for run in runs),
        by_seed=tuple(rounds[-1].get("accuracy") for rounds in courses.values()),
    )


def _point(courses: Sequence[RunMetrics], index: int) -> RoundPoint:
    at = [rounds[index] for rounds in courses]
    return RoundPoint(
        round=index + 1,
        # Only if all seeds have a score in this round.
        accuracy=_over(at if all("accuracy" in metrics for metrics in at) else (), "accuracy"),
        energy_ratio=_over(at, "energy_ratio"),
        norm=_over(at, "norm"),
    )


def _over(rounds: Sequence[Mapping[str, Any]], name: str) -> Spread:
    return spread(metrics.get(name) for metrics in rounds)


def _mean(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(metrics[name] for metrics in rounds) if rounds else 0.0
