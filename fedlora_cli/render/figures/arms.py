"""Panels of a simulation by round: accuracy, energy beyond the shared rank, and their key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedlora_cli.render.figures.canvas import line_style, literal
from fedlora_cli.render.figures.panels import decades, heading, mark_below, nothing, whole_ticks
from fedlora_cli.render.figures.values import Floats, floor, numbers
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
        lines.append(ArmLine(row, f"{literal(row.arm, 40)}{rate}{gone}", line_style(i)))
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
            rounds, spreads = zip(*points, strict=True)
            _curve(axes, line, rounds, spreads, lines)
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
    known = numbers(spread.mean for spreads in series.values() for spread in spreads)
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
            mark_below(axes, np.array(rounds), means(points)[0], bottom, line.style["color"])
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
    deviations = np.nan_to_num(numbers(spread.sd for spread in spreads))
    return numbers(spread.mean for spread in spreads), deviations


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


def _round_axis(axes: Axes, report: SimulateReport) -> None:
    # Markers at both ends are whole.
    axes.set(xlim=(-0.02 * report.rounds, 1.03 * report.rounds), xlabel="round")
    whole_ticks(axes.xaxis)
