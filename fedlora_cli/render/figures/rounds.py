"""The figure of a series of rounds: energy beyond the shared rank, κ, and energy by rank index."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlora_cli.render.figures.canvas import COLORS, QUIET, literal, new_figure
from fedlora_cli.render.figures.heat import boundary, energy_map
from fedlora_cli.render.figures.modules import MOST, module_map
from fedlora_cli.render.figures.panels import (
    decades,
    heading,
    legend_below,
    mark_below,
    nothing,
    percent_axis,
    whole_ticks,
)
from fedlora_cli.render.figures.values import Floats, floor, numbers, shares
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, Thresholds, Trend

_PREDICTED = ":"


def rounds_figure(report: DiagnoseReport, title: str) -> Figure:
    """(a) 1 - ρ by round, (b) rounds × rank index, (c) κ by round, (d) the last round's modules."""
    last = report.adapters[-1]
    lower = max(3.9, 1.6 + 0.145 * min(len(last.modules), MOST))
    figure = new_figure(11.5, 4.6 + lower, title)
    grid = figure.subplots(2, 2, height_ratios=(4.0, lower), width_ratios=(1, 1.1))
    (beyond, ranks), (kept, modules) = grid
    if report.trend is None:
        nothing(beyond, "Energy beyond the shared rank", "The rounds show no trend.")
        nothing(kept, "Clients' energy that is left", "The rounds show no trend.")
    else:
        _beyond(beyond, report.trend, report.shared_rank)
        _kept(kept, report.trend, report.thresholds)
    dead = report.thresholds.dead
    _ranks(ranks, report.adapters, report.shared_rank, dead)
    module_map(modules, last.modules, report.shared_rank, dead, f" in {literal(last.name, 24)}")
    return figure


def _beyond(axes: Axes, trend: Trend, shared_rank: int | None) -> None:
    title = "Energy beyond the shared rank"
    series = [1 - numbers(values) for values in (
        trend.energy_ratio, trend.clients_energy_ratio, trend.predicted_energy_ratio
    )]  # fmt: skip
    if not any(np.isfinite(values).any() for values in series):
        nothing(axes, title, "There is no shared rank, or no energy.")
        return
    heading(axes, title, _decay(trend))
    known = np.concatenate(series[:2] if np.isfinite(series[0]).any() else series)
    bottom = floor(known)
    decades(axes, bottom, 1.15)
    looks = (("-o", "global adapter"), ("--s", "clients above the shared rank"),
             (_PREDICTED, "predicted without training"))  # fmt: skip
    for values, (form, label), color in zip(series, looks, (*COLORS[:2], "black"), strict=True):
        _line(axes, values, bottom, form, label, color)
    if any((values < bottom).any() for values in series):
        axes.plot([], [], "v", color=QUIET, markerfacecolor="white", label="below the scale")
    _round_axis(axes, trend)
    rank = "the shared rank" if shared_rank is None else f"rank {shared_rank}"
    axes.set_ylabel(f"1 - ρ: energy beyond {rank} (log scale)")
    legend_below(axes, 2)


def _line(axes: Axes, values: Floats, bottom: float, form: str, label: str, color: str) -> None:
    """One line, with gaps for unknown values and triangles for values below the axis."""
    if not np.isfinite(values).any():
        return
    rounds = np.arange(1, values.size + 1)
    visible = np.where(values > 0, values, np.nan)
    axes.plot(rounds, visible, form, color=color, label=label, markersize=4)
    if form == _PREDICTED:  # it never rises again: one mark is enough
        below = np.flatnonzero(values < bottom)[:1]
        rounds, values = rounds[below], values[below]
    mark_below(axes, rounds, values, bottom, color)


def _decay(trend: Trend) -> str:
    parts = []
    if trend.gamma is not None:
        fit = f"γ = {trend.gamma:.3g} per round"
        if trend.fitted_from is not None:
            fit += f" from round {trend.fitted_from} on"
        if trend.r_squared is not None:
            fit += f" (R² {trend.r_squared:.2f})"
        parts.append(fit)
    if trend.predicted_gamma is not None:
        parts.append(f"predicted {trend.predicted_gamma:.3g}")
    return "; ".join(parts)


def _round_axis(axes: Axes, trend: Trend) -> None:
    axes.set_xlim(0.5, trend.rounds + 0.5)
    whole_ticks(axes.xaxis)
    first, last = literal(trend.names[0], 20), literal(trend.names[-1], 20)
    axes.set_xlabel(f"round ({first})" if trend.rounds == 1 else f"round ({first} to {last})")


def _kept(axes: Axes, trend: Trend, limits: Thresholds) -> None:
    title = "Clients' energy that is left"
    values = numbers(trend.kept)
    if not np.isfinite(values).any():
        nothing(axes, title, "κ is unknown without the clients' adapters.")
        return
    heading(axes, title, f"κ: share of their energy beyond rank {trend.judged_rank}")
    rounds = np.arange(1, values.size + 1)
    axes.plot(rounds, values, "-o", color=COLORS[0], markersize=4, clip_on=False)
    axes.set(ylim=(0, max(1.05, 1.05 * float(np.nanmax(values)))), ylabel="κ: share kept")
    _round_axis(axes, trend)
    for level, name in ((limits.at_risk, "at risk"), (limits.collapsed, "collapsed")):
        axes.axhline(level, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} below {100 * level:.0f} %", (1, level), (0, 2),
            xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="bottom", fontsize=7.5, color=QUIET,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )  # fmt: skip
    percent_axis(axes.yaxis)


def _ranks(axes: Axes, rows: tuple[AdapterRow, ...], shared_rank: int | None, dead: float) -> None:
    title = "Where the global adapter's energy lies"
    width = max((len(row.energy) for row in rows), default=0)
    values = np.full((width, len(rows)), np.nan)
    for i, row in enumerate(rows):
        values[: len(row.energy), i] = shares(row.energy)
    if not np.isfinite(values).any():
        nothing(axes, title, "No round has any energy.")
        return
    heading(axes, title, "all modules together")
    energy_map(axes, values, dead, "share of the round's energy")
    boundary(axes.axhline, shared_rank, width)
    whole_ticks(axes.xaxis)
    whole_ticks(axes.yaxis)
    axes.set(xlabel="round", ylabel="rank index")
