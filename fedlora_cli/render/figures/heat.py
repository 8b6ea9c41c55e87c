"""Heat maps of energy shares on a logarithmic scale, and of matrices with their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from fedlora_cli.render.figures.canvas import HEAT, INK, literal
from fedlora_cli.render.figures.panels import percent_axis
from fedlora_cli.render.figures.values import Floats, thinned

#: The most numbers per row of a matrix that stay legible, and the most names.
_NUMBERS = 12
_NAMES = 25


def energy_map(axes: Axes, values: Floats, dead: float, label: str) -> AxesImage:
    """A map of shares of energy, its rows and columns counted from 1. Unknown shares are hatched,
    shares below `dead` have the darkest color. All figures have the same color scale.
    """
    rows, columns = values.shape
    norm = LogNorm(vmin=dead, vmax=1)
    image = _image(axes, np.where(values > 0, values, np.where(values == 0, dead / 10, np.nan)),
                   norm, HEAT, (0.5, columns + 0.5, rows + 0.5, 0.5))  # fmt: skip
    bar = _color_bar(axes, image, label, extend="min")
    percent_axis(bar)
    bar.set_minor_locator(NullLocator())
    return image


def boundary(draw: Callable[..., Line2D], shared_rank: int | None, width: int) -> None:
    """A line at the end of the shared rank on a map of `width` rank indices; `draw` is the axhline
    or axvline of the axes.
    """
    if shared_rank is None or not 0 < shared_rank < width:
        return
    draw(shared_rank + 0.5, color="white", linewidth=2.4)
    draw(shared_rank + 0.5, color="black", linewidth=1, linestyle=(0, (3, 2)))


def matrix(
    axes: Axes,
    values: Floats,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    norm: Normalize,
    colors: str,
    written: Callable[[float], str] = lambda value: f"{value:.2f}".replace("-0.00", "0.00"),
) -> AxesImage:
    """A matrix; small ones show their numbers, formatted by `written`."""
    image = _image(axes, values, norm, colors, None)
    _color_bar(axes, image, label, extend="neither")
    down, across = thinned(len(rows), _NAMES), thinned(len(columns), _NAMES)
    labels = [literal(columns[i], 18) for i in across]
    upright = len(columns) > 6 or max(map(len, labels), default=0) > 8
    axes.set_xticks(across, labels, rotation=90 if upright else 0, fontsize=7.5)
    axes.set_yticks(down, [literal(rows[i], 18) for i in down], fontsize=7.5)
    if max(len(rows), len(columns)) <= _NUMBERS:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                light = np.dot(image.to_rgba(np.array([value]))[0, :3], (0.299, 0.587, 0.114)) > 0.5
                axes.text(
                    j, i, written(float(value)), ha="center", va="center", fontsize=7,
                    color=INK if light else "white",
                )  # fmt: skip
    return image


def _image(
    axes: Axes,
    values: Floats,
    norm: Normalize,
    colors: str,
    extent: tuple[float, float, float, float] | None,
) -> AxesImage:
    axes.patch.set(hatch="////", edgecolor="#BFBFBF", linewidth=0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    return axes.imshow(
        np.ma.masked_invalid(values), norm=norm, cmap=colors, extent=extent, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip


def _color_bar(axes: Axes, image: AxesImage, label: str, *, extend: str) -> Axis:
    bar = axes.figure.colorbar(
        image, ax=axes, extend=extend, extendfrac=0.025, aspect=28, pad=0.02, fraction=0.06,
        label=label,
    )  # fmt: skip
    bar.outline.set_visible(False)
    return bar.ax.yaxis
