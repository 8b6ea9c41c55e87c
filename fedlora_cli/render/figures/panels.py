"""Helpers for the panels of all figures: headings, legends, ticks, and empty panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from fedlora_cli.render.figures.canvas import QUIET

Floats = npt.NDArray[np.float64]

#: Smaller shares of the energy are rounding errors of float32.
LOWEST = 1e-9


def heading(axes: Axes, title: str, note: str = "") -> None:
    """The title of a panel, and a note in a second line."""
    axes.set_title(title, pad=19 if note else 7)
    if note:
        axes.annotate(
            note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
            fontsize=8, color=QUIET, va="bottom",
        ).set_in_layout(False)  # fmt: skip


def legend_below(axes: Axes, columns: int, space: float = 34) -> None:
    """The legend below the axis label, `space` points down, outside the data."""
    if not axes.get_legend_handles_labels()[0]:
        return
    down = ScaledTranslation(0, -space / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=axes.transAxes + down,
        ncols=columns, handlelength=2.4, columnspacing=1.3,
    )  # fmt: skip


def nothing(axes: Axes, title: str, why: str) -> None:
    """An empty panel with the reason."""
    heading(axes, title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.text(0, 0.97, why, transform=axes.transAxes, color=QUIET, va="top", wrap=True)


def shares(energy: Sequence[float]) -> Floats:
    """Each energy as a share of the sum; NaN if the sum is zero.

    >>> shares([3.0, 1.0]), shares([0.0])
    (array([0.75, 0.25]), array([nan]))
    """
    values = np.asarray(energy, dtype=np.float64)
    total = values.sum()
    return values / total if 0 < total < np.inf else np.full(values.shape, np.nan)


def numbers(values: Iterable[float | None]) -> Floats:
    """An array with NaN for unknown values."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def floor(values: Floats) -> float:
    """The power of ten below all positive values, at least `LOWEST`.

    >>> floor(np.array([0.5, 0.02, 0.0])), floor(np.array([0.5, 1e-30])), floor(np.array([np.nan]))
    (0.01, 1e-09, 0.1)
    """
    positive = values[values > 0]
    least = max(float(positive.min(initial=0.5)), LOWEST)
    return float(10.0 ** np.floor(np.log10(least) + 1e-9))


def percent_axis(axis: Axis) -> None:
    """An axis of shares, its labels in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


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


def whole_ticks(axis: Axis, most: int = 16) -> None:
    """Ticks at whole numbers only: rounds, rank indices."""
    axis.set_major_locator(
        MaxNLocator(nbins=most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )


def thinned(count: int, most: int) -> list[int]:
    """Every n-th of `count` positions from 0, at most `most` of them.

    >>> thinned(5, 10), thinned(10, 4)
    ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, count, max(1, -(-count // most))))
