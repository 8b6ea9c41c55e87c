"""Panels of a simulation by round: accuracy, energy beyond the shared rank, and their key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedlora_cli.render.figures.canvas import COLOURS, DASHES, MARKERS, literal
from fedlora_cli.render.figures.panels import (
    Floats,
    decades,
    floor,
    heading,
    nothing,
    numbers,
    whole_ticks,
)
from fedlora_cli.reports.simulate import ArmRow, SimulateReport, Spread
from fedlora_cli.text import rank_range

#: The most bands that stay distinguishable.
_BANDS = 6

#: Characters of a line of the key, and of an entry besides its name.
_KEY = (148, 10)


@dataclass(frozen=True)
class ArmLine:
    """An arm at its best rate, and the style of its line."""

    row: ArmRow
    label: str
    style: dict[str, Any]


def arm_lines(report: SimulateReport) -> list[ArmLine]:
    """One line per arm, each with its own style."""
    lines = []
    for i, row in enumerate(report.best):
        rate = f", lr {row.rate:g}" if len(report.rates) > 1 else ""
        gone = "" if row.rounds else ", diverged"
        # Dashes and markers shift when the colors repeat.
        place, other = i % len(COLOURS), (i + i // len(COLOURS)) % len(DASHES)
        style = {"color": COLOURS[place], "linestyle": DASHES[other], "marker": MARKERS[other]}
        lines.append(ArmLine(row, f"{literal(row.arm, 40)}{rate}{gone}", style))
    return lines


def accuracies(axes: Axes, report: SimulateReport, lines: Sequence[ArmLine]) -> None:
    """Accuracy by round, from the untrained adapter on."""
    title = "Accuracy by round"
    scored = {
        line.row.arm: [
            (p.round, p.accuracy) for p in line.row.rounds if p.accuracy.mean is not None
        ]
        for line in lines
    }
    if not any(scored.values()):
        nothing(axes, title, "No round was scored.")
        return
    start = report.start_accuracy
    for line in lines:
        points = scored[line.row.arm]
        if points:
            points = [(0, start), *points] if start.mean is not None else points
            _curve(axes, line, [number for number, _ in points], [one for _, one in points], lines)
    seeds = len(report.seeds)
    mean = f", mean over {seeds} seeds" if seeds > 1 else ""
    band = " ± standard deviation" if seeds > 1 and len(lines) <= _BANDS else ""
    heading(axes, title, f"of the global adapter on the test examples{mean}{band}")
    _round_axis(axes, report)
    axes.grid(axis="y")
    axes.set_ylabel("accuracy")


def energies(axes: Axes, report: SimulateReport, lines: Sequence[ArmLine]) -> None:
    """1 - ρ by round, on a log scale: geometric decay is a straight line."""
    title = "Energy beyond the shared rank"
    series = {
        line.row.arm: [_beyond(point.energy_ratio) for point in line.row.rounds] for line in lines
    }
    known = numbers(one.mean for own in series.values() for one in own)
    if not (known > 0).any():
        inside = rank_range(1, report.shared_rank)
        why = f"All of it lies in rank index {inside}, which every client holds."
        nothing(axes, title, why if np.isfinite(known).any() else "No round came to its end.")
        return
    bottom = floor(known)
    decades(axes, bottom, 1.15)
    for line in lines:
        rounds, points = [point.round for point in line.row.rounds], series[line.row.arm]
        if points:
            _curve(axes, line, rounds, points, lines, bottom / 10)
            _mark_below(axes, line, np.array(rounds), numbers(one.mean for one in points), bottom)
    under = "; triangles: below the scale" if (known < bottom).any() else ""
    heading(axes, title, f"a straight fall is geometric: rank collapse{under}")
    _round_axis(axes, report)
    axes.set_ylabel(f"1 - ρ: energy beyond rank {report.shared_rank} (log scale)")


def key_rows(lines: Sequence[ArmLine]) -> int:
    """The number of rows of the key."""
    return -(-len(lines) // _beside(lines))


def key(axes: Axes, lines: Sequence[ArmLine]) -> None:
    """The key of all panels, in separate axes."""
    axes.set_axis_off()
    handles = [Line2D([], [], label=line.label, **line.style) for line in lines]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=_beside(lines),
        handlelength=3.2, columnspacing=1.6,
    )  # fmt: skip


def means(spreads: Sequence[Spread]) -> tuple[Floats, Floats]:
    """Means and standard deviations; the deviation of a single run is 0."""
    deviations = numbers(one.sd for one in spreads)
    return numbers(one.mean for one in spreads), np.nan_to_num(deviations)


def _beside(lines: Sequence[ArmLine]) -> int:
    return max(1, _KEY[0] // (max(len(line.label) for line in lines) + _KEY[1]))


def _beyond(ratio: Spread) -> Spread:
    return Spread(None if ratio.mean is None else 1 - ratio.mean, ratio.sd)


def _curve(
    axes: Axes,
    line: ArmLine,
    rounds: Sequence[int],
    points: Sequence[Spread],
    lines: Sequence[ArmLine],
    least: float = -np.inf,
) -> None:
    """The mean, and a band for few arms; values below `least` are raised to it."""
    values, deviations = means(points)
    shown = np.maximum(values, least)
    few = len(lines) <= _BANDS
    axes.plot(
        rounds, shown, **line.style, markersize=4.5 if few else 3.5,
        markevery=max(1, len(rounds) // 10), zorder=3,
    )  # fmt: skip
    if few and deviations.any():
        low = np.maximum(shown - deviations, least)
        axes.fill_between(
            rounds, low, shown + deviations, color=line.style["color"], alpha=0.13, linewidth=0
        )


def _mark_below(
    axes: Axes, line: ArmLine, rounds: npt.NDArray[np.int64], values: Floats, bottom: float
) -> None:
    below = rounds[values < bottom]
    if below.size:
        axes.plot(
            below, np.full(below.size, bottom), "v", color=line.style["color"], clip_on=False,
            markersize=5, markerfacecolor="white", zorder=5,
        )  # fmt: skip


def _round_axis(axes: Axes, report: SimulateReport) -> None:
    axes.set_xlim(-0.02 * report.rounds, 1.03 * report.rounds)  # markers at both ends are whole
    whole_ticks(axes.xaxis)
    axes.set_xlabel("round")
