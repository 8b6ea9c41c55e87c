"""The embedded simulation as a person runs it: the table of `samples/README.md`, trained anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora_cli.reports.simulate import ArmRow
from fedlora_cli.simulation.simulate import simulate

pytestmark = pytest.mark.benchmark


def test_flexlora_collapses_raflora_does_not_and_momentum_adds(tmp_path: Path) -> None:
    """All at one learning rate; `samples/simulations` has each at its own best one."""
    report = simulate(tmp_path / "run")
    flexlora, raflora, momentum = report.arms

    assert [row.arm for row in report.arms] == ["flexlora", "raflora", "raflora-b0.8"]
    assert min(rho(flexlora)[-1:]) > 0.99
    lost = [1 - value for value in rho(flexlora)]
    assert lost[-1] < 0.5 * lost[4] < 0.25 * lost[0]
    assert flexlora.gamma.mean is not None
    assert flexlora.gamma.mean < 0.95  # of the later half, where training puts most back
    assert max(rho(raflora)[-1:]) < 0.9
    assert set(flexlora.verdicts) == {"collapsed"}
    assert not {"collapsing", "collapsed"} & set(raflora.verdicts)
    assert points(raflora) > points(flexlora)
    assert points(momentum) >= points(raflora) + 6


def rho(row: ArmRow) -> list[float]:
    return [point.energy_ratio.mean or 0.0 for point in row.rounds]


def points(row: ArmRow) -> float:
    assert row.accuracy.mean is not None
    return 100 * row.accuracy.mean
