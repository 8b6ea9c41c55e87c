"""The figure of a comparison of all methods on the same clients."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fedlora_cli.render.figures.canvas import (
    BEYOND,
    HEAT,
    QUIET,
    WITHIN,
    line_style,
    literal,
    look,
    new_figure,
)
from fedlora_cli.render.figures.heat import matrix
from fedlora_cli.render.figures.panels import (
    decades,
    heading,
    legend_below,
    nothing,
    percent_axis,
    whole_ticks,
)
from fedlora_cli.render.figures.values import floor, numbers
from fedlora_cli.render.wording import rho
from fedlora_cli.reports.compare import CompareReport, MethodRow


@look()
def compare_figure(report: CompareReport) -> Figure:
    """(a) ρ by method, (b) the distances between the methods, (c) their energy by rank index."""
    clients, count = len(report.ranks), len(report.methods)
    ran = count - sum(row.refused is not None for row in report.methods)
    title = f"{ran} of {count} methods on the same {clients} clients"
    figure = new_figure(11.5, 6.6 + 0.22 * count, title)
    heights = (2.0 + 0.22 * count, 4)
    panels = figure.subplot_mosaic([["a", "b"], ["c", "c"]], height_ratios=heights)
    _ratios(panels["a"], report)
    _distances(panels["b"], report)
    _energy(panels["c"], report)
    return figure


def _ratios(axes: Axes, report: CompareReport) -> None:
    rows = report.methods
    known = numbers(row.energy_ratio for row in rows)
    y = np.arange(len(rows))
    within = np.nan_to_num(known)
    beyond = np.where(np.isfinite(known), 1 - within, 0)
    axes.barh(y, within, 0.72, color=WITHIN, label=f"within the shared rank {report.shared_rank}")
    axes.barh(y, beyond, 0.72, within, color=BEYOND, label="beyond it")
    for i, row in enumerate(rows):
        if row.energy_ratio is not None:
            axes.text(0.015, i, rho(row.energy_ratio), va="center", color="white", fontsize=8)
        else:
            axes.text(0.015, i, _absence(row), va="center", color=QUIET, fontsize=7, style="italic")
    axes.set_yticks(y, [literal(row.name, 18) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="share of the method's own energy")
    percent_axis(axes.xaxis)
    title = "ρ: share of the energy within the shared rank"
    heading(axes, title, "near 1: little energy beyond it")
    legend_below(axes, 2)


def _absence(row: MethodRow) -> str:
    """The reason in short, because the tables have the whole message."""
    if row.refused is None:
        return "no energy"
    return f"cannot run: {literal(row.refused.split(': ')[-1].split('; ')[0], 60)}"


def _distances(axes: Axes, report: CompareReport) -> None:
    title = "Distances between the updates"
    ran = [i for i, row in enumerate(report.methods) if row.refused is None]
    values = np.array([numbers(row) for row in report.distances])
    if not ran or not np.isfinite(values).any():
        nothing(axes, title, "No method could run.")
        return
    heading(axes, title, "‖ΔW_a - ΔW_b‖ relative to the norm of the exact mean")
    values = values[np.ix_(ran, ran)]
    top = float(np.nanmax(values, initial=0)) or 1.0
    names = [report.methods[i].name for i in ran]
    matrix(axes, values, names, names, "relative distance", Normalize(0, top), HEAT)


def _energy(axes: Axes, report: CompareReport) -> None:
    title = "Energy by rank index"
    unit = report.mean_norm**2 or 1.0
    lines = {row.name: np.array(row.energy) / unit for row in report.methods if any(row.energy)}
    if not lines:
        nothing(axes, title, "No method has any energy.")
        return
    width = min(max(report.ranks), max(values.size for values in lines.values()))
    everything = np.concatenate([values[:width] for values in lines.values()])
    decades(axes, floor(everything), 1.6 * float(everything.max()))
    # Markers are shifted by line, so that lines that coincide stay visible.
    step = min(max(3, width // 8), width)
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(
            np.arange(1, values.size + 1), np.where(values > 0, values, np.nan),
            label=literal(name, 18), markevery=(i % step, step), **line_style(i),
        )  # fmt: skip
    if report.shared_rank < width:
        axes.axvline(report.shared_rank + 0.5, color=QUIET, linewidth=1, linestyle=(0, (3, 2)))
    whole_ticks(axes.xaxis)
    axes.set(xlim=(0.5, width + 0.5), xlabel="rank index")
    axes.set_ylabel("energy, relative to the exact mean's (log scale)")
    longer = [literal(name, 18) for name, values in lines.items() if values.size > width]
    more = f"; cut at {width}: {', '.join(longer)}" if longer else ""
    heading(axes, title, f"dashed: the end of the shared rank{more}")
    legend_below(axes, 8)
