"""The style of every figure, and a figure as bytes, without windows and global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedlora_cli.text import printable

#: The palette of Okabe and Ito for color-blind readers, without yellow, which is pale on paper.
#: Lines also differ in dashes and markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

#: Energy within and beyond the shared rank: different in hue and in brightness.
WITHIN, BEYOND = "#0072B2", "#F0B45A"

#: Colors of text, of notes and thresholds, and of the grid.
INK, QUIET, FAINT = "#1A1A1A", "#595959", "#D9D9D9"

#: A sequential and a diverging color map, readable in gray and for color-blind readers.
HEAT = "cividis"
DIVERGING = "RdBu_r"

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.hspace": 0.03,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.wspace": 0.03,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.color": "#BFBFBF",
    "hatch.linewidth": 0.6,
    "legend.borderaxespad": 0,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 160,
    "svg.hashsalt": "fedlora",  # the same figure, the same bytes
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.7),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
}

#: Without dates and versions, so that the same figure has the same bytes.
_METADATA = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "pdf": {"CreationDate": None},
}


@contextmanager
def look() -> Iterator[None]:
    """A context in which figures have this style, independent of the user's matplotlibrc."""
    with style.context(_STYLE, after_reset=True):
        yield


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of this size in inches, to be filled within the same `look`."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure


def line_style(number: int) -> dict[str, Any]:
    """The style of a line; dashes and markers shift when the colors repeat."""
    other = (number + number // len(COLORS)) % len(DASHES)
    color = COLORS[number % len(COLORS)]
    return {"color": color, "linestyle": DASHES[other], "marker": MARKERS[other]}


def literal(name: str, length: int = 40) -> str:
    r"""A name as literal text, shortened in the middle; dollars are escaped, no formula begins.

    >>> literal("a$b"), literal("layers.0.self_attn.q_proj", 15)
    ('a\\$b', 'layers.….q_proj')
    """
    text = printable(name)
    if len(text) > length:
        half = (length - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as png, svg or pdf; the same figure has the same bytes."""
    buffer = io.BytesIO()
    with look(), warnings.catch_warnings():
        # Letters that the font lacks show as boxes; the tables have the names in full.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        # The layout depends on the resolution; all kinds share the first layout.
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
    return buffer.getvalue()
