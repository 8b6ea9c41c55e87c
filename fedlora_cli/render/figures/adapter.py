"""The figure of one adapter: its energy by rank index, of all modules and of each module."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlora_cli.render.figures.canvas import BEYOND, WITHIN, literal, new_figure
from fedlora_cli.render.figures.modules import MOST, module_map
from fedlora_cli.render.figures.panels import decades, heading, legend_below, nothing, whole_ticks
from fedlora_cli.render.figures.values import floor, shares
from fedlora_cli.render.wording import rho
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport
from fedlora_cli.text import rank_range


def adapter_figure(report: DiagnoseReport, title: str) -> Figure:
    """(a) the pooled energy by rank index, (b) modules × rank index."""
    row = report.adapters[0]
    labels = min(len(row.modules), MOST)
    figure = new_figure(11.5, max(4.4, 1.9 + 0.145 * labels), title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _energy(left, row, report.shared_rank)
    module_map(right, row.modules, report.shared_rank, report.thresholds.dead)
    return figure


def _energy(axes: Axes, row: AdapterRow, shared_rank: int | None) -> None:
    title = "Energy by rank index, all modules together"
    share = shares(row.energy)
    if not np.isfinite(share).any():
        nothing(axes, title, f"{literal(row.name)} has no energy: every update in it is zero.")
        return
    notes = [f"effective rank {row.effective_rank:.1f}", f"{row.rank_99} hold 99 %"]
    if row.energy_ratio is not None:
        notes.insert(0, f"ρ = {rho(row.energy_ratio)}")
    heading(axes, title, ", ".join(notes))
    decades(axes, floor(share) / 2, 1)
    index = np.arange(1, share.size + 1)
    split = share.size if shared_rank is None else shared_rank
    width = 0.82 if share.size <= 64 else 1.0
    for part, color, label in (
        (slice(0, split), WITHIN, f"within the shared rank, {rank_range(1, split)}"),
        (slice(split, None), BEYOND, f"beyond it, from {split + 1}"),
    ):
        if index[part].size:
            axes.bar(index[part], share[part], width, color=color, label=label)
    axes.set(xlim=(0.4, share.size + 0.6), xlabel="rank index")
    axes.set_ylabel("share of the energy (log scale)")
    whole_ticks(axes.xaxis)
    if shared_rank is not None:
        legend_below(axes, 2)
