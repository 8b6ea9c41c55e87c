"""Parts of the panels of all figures: headings, legends, axes, marks, and empty panels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from fedlora_cli.render.figures.canvas import QUIET
from fedlora_cli.render.figures.values import Floats


def heading(axes: Axes, title: str, note: str = "") -> None:
    """The title of a panel, and a note in a second line."""
    axes.set_title(title, pad=19 if note else 7)
    if note:
        axes.annotate(
            note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
            fontsize=8, color=QUIET, va="bottom",
        ).set_in_layout(False)  # fmt: skip


def legend_below(axes: Axes, columns: int) -> None:
    """The legend below the axis label, outside the data."""
    if not axes.get_legend_handles_labels()[0]:
        return
    down = ScaledTranslation(0, -34 / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=axes.transAxes + down,
        ncols=columns, handlelength=2.4, columnspacing=1.3,
    )  # fmt: skip


def nothing(axes: Axes, title: str, why: str) -> None:
    """An empty panel with the reason."""
    heading(axes, title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(0, 0.97, why, transform=axes.transAxes, color=QUIET, va="top", wrap=True)


def mark_below(axes: Axes, x: npt.NDArray[Any], values: Floats, bottom: float, color: str) -> None:
    """A triangle at the bottom of the axis for every value below it."""
    below = values < bottom
    if below.any():
        axes.plot(
            x[below], np.full(below.sum(), bottom), "v", color=color, clip_on=False,
            markersize=5, markerfacecolor="white", zorder=5,
        )  # fmt: skip


def percent_axis(axis: Axis) -> None:
    """An axis of shares, its labels in percent."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def decades(axes: Axes, bottom: float, top: float) -> None:
    """A logarithmic y axis of shares, one label per decade while there is room, in percent.

    Call it before drawing, because matplotlib derives the limits from drawn data.
    """
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    percent_axis(axes.yaxis)
    axes.grid(axis="y")


def whole_ticks(axis: Axis) -> None:
    """Ticks at whole numbers only: rounds, rank indices."""
    axis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
