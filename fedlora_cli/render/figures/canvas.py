"""The look of every figure, and a figure as bytes. Nothing here shows a window or keeps state."""

from __future__ import annotations

import io
import warnings
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedlora_cli.errors import printable

#: The palette of Okabe and Ito, which colour-blind people can tell apart, without its yellow, which
#: paper loses. Lines differ in their dashes as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))

#: A map of one hue order that stays readable in grey and to the colour-blind.
HEAT = "cividis"

_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.grid": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 160,
    "svg.hashsalt": "fedlora",  # the same figure, the same bytes
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}

#: Nothing that would differ from one run to the next.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def new_axes(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches, and its axes row by row."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def literal(name: str, length: int = 40) -> str:
    r"""A name from a file as text, shortened in the middle: no dollar in it begins a formula.

    >>> literal("a$b"), literal("layers.0.self_attn.q_proj", 15)
    ('a\\$b', 'layers.….q_proj')
    """
    text = printable(name)
    if len(text) > length:
        half = (length - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as png, svg or pdf, the same bytes every time."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
    return buffer.getvalue()
