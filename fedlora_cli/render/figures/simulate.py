"""The figure of a simulation: accuracy and ρ by round, by rate, by quorum and momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fedlora_cli.render.figures import arms
from fedlora_cli.render.figures.arms import ArmLine, arm_lines, means
from fedlora_cli.render.figures.canvas import HEAT, literal, look, new_figure
from fedlora_cli.render.figures.heat import matrix
from fedlora_cli.render.figures.panels import heading, nothing
from fedlora_cli.render.figures.values import numbers, thinned
from fedlora_cli.render.wording import count, rho
from fedlora_cli.reports.simulate import Grid, SimulateReport

#: The most learning rates with a label.
_LABELS = 12


@look()
def simulate_figure(report: SimulateReport) -> Figure:
    """(a) accuracy and (b) 1 - ρ by round, and their key; for several rates (c) accuracy by rate;
    for grids (d, e) accuracy and ρ by quorum and momentum.
    """
    lines = arm_lines(report)
    rows: list[Any] = [["a", "b"], ["key", "key"]]
    heights = [3.6, 0.12 + 0.19 * arms.key_rows(lines)]
    if len(report.rates) > 1:
        rows.append(["rates", "rates"])
        heights.append(2.9)
    for i, grid in enumerate(report.grids):
        rows.append([f"accuracy {i}", f"ρ {i}"])
        heights.append(1.3 + 0.45 * len(grid.quorums))
    arm_count, clients = count(len(report.best), "arm"), count(len(report.ranks), "client")
    rounds, seeds = count(report.rounds, "round"), count(len(report.seeds), "seed")
    title = f"{literal(report.task, 50)}: {arm_count}, {clients}, {rounds}, {seeds}"
    figure = new_figure(11.5, sum(heights) + 0.85 * len(heights), title)
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    arms.accuracies(panels["a"], report, lines)
    arms.energies(panels["b"], report, lines)
    arms.key(panels["key"], lines)
    if len(report.rates) > 1:
        _rates(panels["rates"], report, lines)
    for i, grid in enumerate(report.grids):
        _maps((panels[f"accuracy {i}"], panels[f"ρ {i}"]), report, grid)
    return figure


def _rates(axes: Axes, report: SimulateReport, lines: Sequence[ArmLine]) -> None:
    title = "Accuracy by learning rate"
    if all(row.accuracy.mean is None for row in report.arms):
        nothing(axes, title, "Every run diverged.")
        return
    crosses = dict.fromkeys(report.rates, 0)
    for line in lines:
        rows = sorted((r for r in report.arms if r.arm == line.row.arm), key=lambda r: r.rate)
        values, deviations = means([row.accuracy for row in rows])
        axes.errorbar([row.rate for row in rows], values, deviations, **line.style, capsize=2.5)
        if line.row.accuracy.mean is not None:
            axes.plot(
                line.row.rate, line.row.accuracy.mean, "o", color=line.style["color"],
                markersize=12, markerfacecolor="none", markeredgewidth=1.2,
            )  # fmt: skip
        for row in rows:
            if row.diverged:
                # Crosses of the same rate are stacked from the bottom.
                axes.plot(
                    row.rate, 0.04 + 0.05 * crosses[row.rate], "x", color=line.style["color"],
                    markersize=7, markeredgewidth=2, transform=axes.get_xaxis_transform(),
                )  # fmt: skip
                crosses[row.rate] += 1
    diverged = "; crosses at the bottom: a run diverged" if any(crosses.values()) else ""
    heading(axes, title, f"circles: the best rate of the arm by validation accuracy{diverged}")
    axes.set(xscale="log", xlabel="learning rate (log scale)", ylabel="accuracy")
    axes.xaxis.set_minor_locator(NullLocator())
    shown = [report.rates[i] for i in thinned(len(report.rates), _LABELS)]
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.grid(axis="y")


def _maps(panels: tuple[Axes, Axes], report: SimulateReport, grid: Grid) -> None:
    cells = [arm for row in grid.rows for arm in row]
    accuracy = numbers(None if arm is None else arm.accuracy.mean for arm in cells)
    ratio = numbers(None if arm is None else arm.energy_ratio.mean for arm in cells)
    for axes, quantity, known, written in (
        (panels[0], "Accuracy", accuracy, f"{{:.{report.digits}f}}".format),
        (panels[1], f"ρ at {report.shared_rank}", ratio, rho),
    ):
        title = f"{quantity} of {grid.method} after the last round"
        if not np.isfinite(known).any():
            nothing(axes, title, "No run came to its end.")
            continue
        notes = ["each at its best rate"] if len(report.rates) > 1 else []
        notes += ["hatched: diverged, or not run"] if np.isnan(known).any() else []
        heading(axes, title, "; ".join(notes))
        rows, columns = ([f"{value:g}" for value in ax] for ax in (grid.quorums, grid.momenta))
        values = known.reshape(len(rows), len(columns))
        norm = Normalize(float(np.nanmin(known)), float(np.nanmax(known)))
        matrix(axes, values, rows, columns, quantity.lower(), norm, HEAT, written)
        axes.set(xlabel="momentum β", ylabel="quorum q")
