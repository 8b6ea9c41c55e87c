"""The figure of a cohort: energy by client, similarity, and holders of the rank indices."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fedlora_cli.render.figures.canvas import COLORS, DIVERGING, HEAT, QUIET, literal, new_figure
from fedlora_cli.render.figures.heat import matrix
from fedlora_cli.render.figures.panels import heading, legend_below, nothing, percent_axis
from fedlora_cli.render.figures.values import numbers, thinned
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, HoldingRow, Similarity
from fedlora_cli.text import rank_range

_LABELS = 100
_KEYS = 8


def clients_figure(report: DiagnoseReport, title: str) -> Figure:
    """(a) each client's energy by partition, (b) their similarity where known, (c) the holders."""
    similarity = None if report.cohort is None else report.cohort.similarity
    holdings = () if report.cohort is None else report.cohort.partitions
    bars = 2.2 + (0.3 if len(report.adapters) <= 20 else 0.13) * len(report.adapters)
    right = (4.2 if similarity else 0) + 2.5 + 0.3 * len(holdings)
    figure = new_figure(11.5, min(max(bars, right), 16), title)
    if similarity is None:
        left, lower = figure.subplots(1, 2)
    else:
        heights = (4.2, 2.1 + 0.3 * len(holdings))
        panels = figure.subplot_mosaic([["a", "b"], ["a", "c"]], height_ratios=heights)
        left, lower = panels["a"], panels["c"]
        _similarity(panels["b"], similarity, [row.name for row in report.adapters])
    _bars(left, report.adapters)
    _holders(lower, holdings)
    return figure


def _bars(axes: Axes, rows: tuple[AdapterRow, ...]) -> None:
    bounds = sorted({(part.first, part.last) for row in rows for part in row.partitions})
    colors = mpl.colormaps[HEAT](np.linspace(0.08, 0.95, max(len(bounds), 1)))
    named = thinned(len(bounds), _KEYS)
    left = np.zeros(len(rows))
    for i, (first, last) in enumerate(bounds):
        energies = [{(p.first, p.last): p.energy for p in row.partitions} for row in rows]
        share = np.nan_to_num(numbers(by_bounds.get((first, last)) for by_bounds in energies))
        axes.barh(
            range(len(rows)), share, 0.6 if len(rows) <= 12 else 0.8, left, color=colors[i],
            edgecolor="white", linewidth=0.5 if len(rows) <= 40 else 0.2,
            label=rank_range(first, last) if i in named else None,
        )  # fmt: skip
        left += share
    for empty in np.flatnonzero(left == 0):
        axes.text(0.01, float(empty), "no energy", va="center", fontsize=7, color=QUIET)
    size = 8 if len(rows) <= 30 else 6
    positions = thinned(len(rows), _LABELS)
    axes.set_yticks(positions, [_label(rows[i]) for i in positions], fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), xlabel="share of the client's own energy, by rank index")
    axes.set(ylim=(len(rows) - 0.4, -0.6), ylabel="client, rank, share of the samples")
    percent_axis(axes.xaxis)
    heading(axes, "Energy of each client by rank index", "strongest directions first")
    legend_below(axes, 4)


def _label(row: AdapterRow) -> str:
    share = "" if row.share is None else f", {100 * row.share:.2g} %"
    return f"{literal(row.name, 24)}, r {row.rank}{share}"


def _similarity(axes: Axes, similarity: Similarity, names: list[str]) -> None:
    values = np.array([numbers(row) for row in similarity.cosine]).reshape(len(names), len(names))
    matrix(axes, values, names, names, "cosine similarity", Normalize(-1, 1), DIVERGING)
    heading(axes, "Similarity of the updates", "cosine of the updates, all modules as one vector")


def _holders(axes: Axes, rows: tuple[HoldingRow, ...]) -> None:
    title = "Holders by rank index"
    if not rows:
        nothing(axes, title, "The holders of the rank indices are unknown.")
        return
    heading(axes, title, "diamond right of the dot: weight exceeds the share of samples")
    y = np.arange(len(rows))
    coverage, weight = numbers(r.coverage for r in rows), numbers(r.max_weight for r in rows)
    axes.hlines(y, coverage, weight, color=QUIET, linewidth=1)
    axes.plot(coverage, y, "o", color=COLORS[0], markersize=7, label="holders' share of samples")
    axes.plot(
        weight, y, "D", color=COLORS[1], markersize=7, markerfacecolor="white",
        markeredgewidth=1.6, label="largest weight of one client by raFLoRA",
    )  # fmt: skip
    axes.set_yticks(y, [_holding(row) for row in rows])
    axes.set(xlim=(-0.03, 1.05), xlabel="share")
    axes.set(ylim=(len(rows) - 0.4, -0.6), ylabel="rank index: holders (heaviest)")
    percent_axis(axes.xaxis)
    axes.grid(axis="x")
    legend_below(axes, 1)


def _holding(row: HoldingRow) -> str:
    heaviest = "" if row.heaviest is None else f" ({literal(row.heaviest, 16)})"
    return f"{rank_range(row.first, row.last)}: {row.holders}{heaviest}"
