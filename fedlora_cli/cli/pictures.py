"""The options `--plot` and `--html`, and the files that they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from fedlora_cli.cli.console import Printing, print_result, quoted, say, warn
from fedlora_cli.errors import OutputError
from fedlora_cli.files.output import check_file, write_file
from fedlora_cli.options import option
from fedlora_cli.render.view import View
from fedlora_cli.reports.compare import CompareReport
from fedlora_cli.reports.diagnose import DiagnoseReport
from fedlora_cli.reports.predict import PredictReport
from fedlora_cli.reports.simulate import SimulateReport
from fedlora_cli.text import first_line

Report = TypeVar("Report", CompareReport, DiagnoseReport, PredictReport, SimulateReport)

#: Formats that matplotlib writes.
PLOTS = (".png", ".svg", ".pdf")
PAGES = (".html", ".htm")

_PANEL = "Pictures"


@dataclass(frozen=True)
class Pictures:
    """The files to draw the result into. Raises UsageError and OutputError where a file cannot be
    written, so that this is known before the work begins.
    """

    plot: Path | None = option(
        None, "Draw the result into a .png, .svg or .pdf file.", panel=_PANEL, metavar="FILE"
    )
    html: Path | None = option(
        None, "Write the tables and the figure as one HTML page.", panel=_PANEL, metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.plot is not None:
            check_file(self.plot, "--plot", PLOTS)
        if self.html is not None:
            check_file(self.html, "--html", PAGES)


def print_with_pictures(
    command: str,
    report: Report,
    printing: Printing,
    pictures: Pictures,
    document: Callable[[Report], dict[str, Any]],
    view: Callable[[Report], View],
    full_view: Callable[[Report], View],
    written: Sequence[Path] = (),
) -> None:
    """Print the warnings and the result, draw the pictures, and name all files that were written.

    `full_view` is for the page. Raises OutputError.
    """
    if not printing.quiet:
        warn(report.warnings)
    drawn: list[Path] = _draw(command, report, pictures, full_view)
    print_result(printing, report, document, view)
    if not printing.quiet:
        for path in (*written, *drawn):
            say("wrote", quoted(path), "bold green")


def _draw(
    command: str, report: Report, pictures: Pictures, view: Callable[[Report], View]
) -> list[Path]:
    """The files written. matplotlib, which is slow to load, is loaded only if there are any."""
    plot, html = pictures.plot, pictures.html
    if plot is None and html is None:
        return []
    try:
        from fedlora_cli.render.figures.canvas import rendered
    except OSError as error:  # neither a home nor a temporary folder for its fonts
        found = f"matplotlib cannot be loaded ({first_line(error)})"
        cure = "set MPLCONFIGDIR to a writable folder"
        raise OutputError(plot or html, found, cure) from None
    from fedlora_cli.render.page import page

    figures = import_module(f"fedlora_cli.render.figures.{command}")
    figure = getattr(figures, f"{command}_figure")(report)
    if plot is not None:
        write_file(plot, rendered(figure, plot.suffix.lower().removeprefix(".")))
    if html is not None:
        write_file(html, page(view(report), rendered(figure, "svg")).encode())
    return [path for path in (plot, html) if path is not None]
