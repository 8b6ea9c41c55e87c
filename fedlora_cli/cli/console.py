"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from fedlora_cli.options import option
from fedlora_cli.text import printable

if TYPE_CHECKING:
    from fedlora_cli.render.view import View
    from fedlora_cli.reports.distribution import DistributeReport, InitReport

#: Columns of a terminal that every table fits into.
TABLE_WIDTH = 80

Report = TypeVar("Report")
Start = TypeVar("Start", bound="DistributeReport | InitReport")


@dataclass(frozen=True)
class Printing:
    """How a command prints its result."""

    json: bool = option(False, "Print one JSON document on standard output.")
    quiet: bool = option(False, "Print errors only.", "-q")
    verbose: bool = option(False, "Show every module.", "-v")
    debug: bool = option(False, "Show the traceback of an error.")


def print_result(
    printing: Printing,
    report: Report,
    document: Callable[[Report], dict[str, Any]],
    view: Callable[[Report], View],
) -> None:
    """Print the report as a JSON document or as tables."""
    if printing.json:
        from fedlora_cli.reports.document import to_json

        typer.echo(to_json(document(report)), nl=False)
    elif not printing.quiet:
        show(view(report))


def errors() -> Console:
    """Standard error: progress, warnings, advice."""
    return Console(stderr=True, soft_wrap=True)


def results() -> Console:
    """Standard output. A narrower terminal wraps the lines of tables, so that no column is lost."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def show(view: View) -> None:
    """Print a view on standard output."""
    from fedlora_cli.render.terminal import on_terminal

    console = results()
    console.print(on_terminal(view, plain=console.options.ascii_only))


def warn(warnings: Sequence[str]) -> None:
    """Print a line for each warning."""
    for warning in warnings:
        say("warning", warning, "yellow")


def say(label: str, text: str, style: str = "bold") -> None:
    """Print a line `label: text` on standard error, free of control characters and not wrapped."""
    errors().print(Text.assemble((f"{label}: ", style), printable(text)))


def print_start(
    printing: Printing,
    report: Start,
    document: Callable[[Start], dict[str, Any]],
    view: Callable[[Start], View],
    following: str,
) -> None:
    """Print the report on adapters to train from, and the command to run after training."""
    if not printing.quiet:
        warn(report.warnings)
    print_result(printing, report, document, view)
    if not printing.quiet:
        say("wrote", quoted(report.output), "bold green")
        say("next", f"train from these; then {following}")


def quoted(*arguments: object) -> str:
    """The arguments as words of a shell.

    >>> quoted("my clients", "global")
    "'my clients' global"
    """
    return shlex.join(map(str, arguments))
