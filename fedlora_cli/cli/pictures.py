"""The options `--plot` and `--html`, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedlora_cli.cli.shared import option
from fedlora_cli.errors import OutputError
from fedlora_cli.files.output import check_file, write_file
from fedlora_cli.render.view import View
from fedlora_cli.text import first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What matplotlib draws and every reader opens.
PLOTS = (".png", ".svg", ".pdf")
PAGES = (".html", ".htm")

_PANEL = "Pictures"

Plot = Annotated[
    Path | None,
    option("--plot", panel=_PANEL, metavar="FILE", help="Draw it into a .png, .svg or .pdf."),
]
Html = Annotated[
    Path | None,
    option("--html", panel=_PANEL, metavar="FILE", help="One self-contained page with it all."),
]


def check_pictures(plot: Path | None, html: Path | None) -> None:
    """Whether they can be written, before the work begins. Raises UsageError and OutputError."""
    if plot is not None:
        check_file(plot, "--plot", PLOTS)
    if html is not None:
        check_file(html, "--html", PAGES)


def write_pictures(
    plot: Path | None, html: Path | None, draw: Callable[[], Figure], view: Callable[[], View]
) -> list[Path]:
    """Write what was asked for; the files written. Draws only then, as matplotlib is slow to load.

    Raises OutputError.
    """
    if plot is None and html is None:
        return []
    try:
        from fedlora_cli.render.figures.canvas import rendered
    except OSError as error:  # neither a home nor a temporary folder for its fonts
        found = f"matplotlib cannot be loaded ({first_line(error)})"
        cure = "set MPLCONFIGDIR to a folder that may be written"
        raise OutputError(plot or html, found, cure) from None
    from fedlora_cli.render.page import page

    figure = draw()
    written = []
    if plot is not None:
        write_file(plot, rendered(figure, plot.suffix.lower().removeprefix(".")))
        written.append(plot)
    if html is not None:
        write_file(html, page(view(), rendered(figure, "svg")).encode())
        written.append(html)
    return written
