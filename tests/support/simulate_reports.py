"""Reports of simulations, made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlora_cli.analysis.lead import lead
from fedlora_cli.reports.simulate import ArmRow, RoundPoint, SimulateReport, Spread

NONE = Spread(None, None)


def around(mean: float, seeds: int, sd: float) -> Spread:
    return Spread(mean, sd if seeds > 1 else None)


def arm(
    method: str,
    quorum: float | None = None,
    momentum: float = 0.0,
    *,
    rate: float = 1e-3,
    accuracy: float = 0.6,
    ratio: float = 0.7,
    sd: float = 0.02,
    seeds: int = 3,
    rounds: int = 20,
    best: bool = True,
    verdict: str | None = "healthy",
    **others: Any,
) -> ArmRow:
    """An arm that comes to that accuracy and that ρ, geometrically."""
    name = method + ("" if quorum is None else f"-q{quorum:g}")
    name += f"-b{momentum:g}" if momentum else ""
    points = tuple(
        RoundPoint(
            t,
            around(accuracy * (1 - math.exp(-4 * t / rounds)), seeds, sd),
            around(1 - 0.5 * (2 * (1 - ratio)) ** (t / rounds), seeds, (1 - ratio) / 10),
            around(t**0.5, seeds, 0.1),
        )
        for t in range(1, rounds + 1)
    )
    row = ArmRow(
        name, method, quorum, momentum, rate, best, seeds, (),
        around(accuracy, seeds, sd), around(accuracy + 0.01, seeds, sd),
        around(ratio, seeds, 0.01), around(7.25, seeds, 0.1), around(4.567, seeds, 0.1),
        around(0.876, seeds, 0.01), (verdict,) * seeds, 1_234_567.0, 987_654.0, 0.1234, 3.21,
        points, tuple(f"run/seed-{seed}/{name}-lr{rate:g}" for seed in range(seeds)),
    )  # fmt: skip
    return replace(row, **others)


def diverged(row: ArmRow, *rounds: int) -> ArmRow:
    """The same arm, whose runs diverged in these rounds: all of them, or some."""
    if len(rounds) < row.runs:
        return replace(row, diverged=rounds)
    return replace(
        row, diverged=rounds, accuracy=NONE, validation=NONE, energy_ratio=NONE,
        effective_rank=NONE, norm=NONE, gamma=NONE, verdicts=(), rounds=(),
        bytes_up=0.0, bytes_down=0.0, server_seconds=0.0, client_seconds=0.0,
    )  # fmt: skip


def simulation(arms: Sequence[ArmRow], **others: Any) -> SimulateReport:
    report = SimulateReport(
        output="run", task="digits", model="run/base",
        setting={
            "source": {"family": "digits", "model": None, "data": []},
            "ranks": [4] * 8 + [32] * 2, "participation": 0.5,
            "split": {"dirichlet": 1.0, "classes": None},
        },
        ranks=(4,) * 8 + (32,) * 2, shared_rank=4, present=5,
        rounds=max((len(row.rounds) for row in arms), default=0) or 20,
        seeds=tuple(range(max(row.runs for row in arms))),
        train_examples=1077, test_examples=360,
        start_accuracy=around(0.1, max(row.runs for row in arms), 0.01),
        arms=tuple(arms), seconds=75.0, warnings=("something to know",), version="1",
    )  # fmt: skip
    report = replace(report, **others)
    return replace(report, lead=lead(report.best, report.test_examples))


PLAIN = (
    arm("flexlora", accuracy=0.52, ratio=0.9979, verdict="collapsed"),
    arm("raflora", accuracy=0.59, ratio=0.73),
    arm("raflora", momentum=0.8, accuracy=0.69, ratio=0.68),
)
