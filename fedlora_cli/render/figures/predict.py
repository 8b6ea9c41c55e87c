"""The figure of a forecast: ρ by round, and the energy factors by rank index."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedlora_cli.render.figures.canvas import HEAT, line_style, look, new_figure
from fedlora_cli.render.figures.values import thinned
from fedlora_cli.render.wording import count, share
from fedlora_cli.reports.predict import MethodForecast, PredictReport
from fedlora_cli.text import rank_range

#: The most partitions with a number each, and with a label each.
_NUMBERED = 8
_LABELLED = 16

_LABEL_WIDTH = 26

Group = tuple[str, MethodForecast]


@look()
def predict_figure(report: PredictReport) -> Figure:
    """Left ρ by round, right the energy factors; methods with equal factors share a line."""
    groups = _groups(report.methods)
    lines = sum(label.count("\n") + 1 for label, _ in groups)
    title = f"Forecast for {count(len(report.ranks), 'client')}, without training"
    figure = new_figure(10.5, max(4.4, 2.2 + 0.26 * lines), title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _curves(left, report, groups)
    _map(figure, right, report, groups)
    return figure


def _groups(methods: tuple[MethodForecast, ...]) -> list[Group]:
    """Methods with equal factors under one label, sorted by the energy that they keep."""
    groups: dict[tuple[float, ...], list[MethodForecast]] = {}
    for method in methods:
        factors = tuple(round(factor, 9) for factor in method.energy_factors)
        groups.setdefault(factors, []).append(method)
    ordered = [groups[factors] for factors in sorted(groups, key=sum, reverse=True)]
    return [(_label([method.name for method in group]), group[0]) for group in ordered]


def _label(names: list[str]) -> str:
    r"""Names in short lines; a quorum belongs to raflora.

    >>> _label(["raflora", "residual", "raflora, quorum 0.25"])
    'raflora, residual,\nraflora with quorum 0.25'
    """
    quorums = [name.partition(", ")[2] for name in names if ", " in name]
    plain = ", ".join(name for name in names if ", " not in name)
    last = f"raflora with {', '.join(quorums)}" if quorums else ""
    lines = [f"{plain}," if plain and last else plain, last]
    return "\n".join(fill(line, _LABEL_WIDTH) for line in lines if line)


def _curves(axes: Axes, report: PredictReport, groups: list[Group]) -> None:
    for i, (label, method) in enumerate(groups):
        rounds = np.arange(len(method.energy_ratio))
        axes.plot(
            rounds, method.energy_ratio, markevery=max(1, len(rounds) // 10), label=label,
            clip_on=False, zorder=3, **line_style(i),
        )  # fmt: skip
    axes.axhline(0.99, color="#8A8A8A", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set(xlim=(0, None), ylim=(0, 1.02), xlabel="round")
    axes.set_ylabel(f"ρ, share of the energy in rank index {rank_range(1, report.shared_rank)}")
    axes.set_title("Rank collapse; dotted: ρ = 0.99")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _map(figure: Figure, axes: Axes, report: PredictReport, groups: list[Group]) -> None:
    parts = report.partitions
    firsts = [part.first - 1 for part in parts]
    values = np.array([method.energy_factors for _, method in groups])[:, firsts]
    image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    ticks = thinned(len(parts), _LABELLED)
    axes.set_xticks(ticks, [rank_range(parts[i].first, parts[i].last) for i in ticks])
    if len(parts) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column, row, share(float(value)), ha="center", va="center", fontsize=8,
                color="white" if value < 0.5 else "black",
            )  # fmt: skip
    else:
        figure.colorbar(image, ax=axes, shrink=0.8, label="factor of the energy")
        axes.tick_params(axis="x", rotation=60)
    axes.set_yticks(range(len(groups)), [label for label, _ in groups])
    for edge in range(1, len(groups)):
        axes.axhline(edge - 0.5, color="white", linewidth=2)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("rank index")
    expected = ", expected" if report.present < len(report.ranks) else ""
    axes.set_title(f"Energy left after one round{expected}")
