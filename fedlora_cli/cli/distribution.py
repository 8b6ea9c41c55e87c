"""What `fedlora init` and `fedlora distribute` have in common on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from fedlora_cli.cli.shared import errors, listed, option, quoted, say, show, warn, whole_numbers
from fedlora_cli.errors import UsageError
from fedlora_cli.remote import Location
from fedlora_cli.render.view import View
from fedlora_cli.reports.distribution import DistributeReport, InitReport
from fedlora_cli.reports.document import to_json

OUTPUT = "Output"

Report = TypeVar("Report", DistributeReport, InitReport)

Alpha = Annotated[
    float | None,
    option("--alpha", help="lora_alpha of all; default: the clients' own, or one scaling for all."),
]
Like = Annotated[
    list[str] | None,
    option(
        "--like",
        metavar="CLIENTS",
        help="As these adapters: a folder, or a folder of folders; again for more, - for stdin.",
    ),
]
LikeAdapter = Annotated[
    str | None,
    option("--adapter", metavar="NAME", help="Those are in the folder NAME of each one's own."),
]
HandoutJobs = Annotated[
    int, option("--jobs", "-j", panel=OUTPUT, help="Adapters at a time; default: all cores.")
]
HandoutForce = Annotated[
    bool, option("--force", "-f", panel=OUTPUT, help="Replace a folder of adapters.")
]


def folders_like(like: Sequence[str] | None, *, null: bool) -> list[Location]:
    """The folders of the clients to be like, if any were named. Raises UsageError."""
    return listed(like, null=null) if like else []


def ranks_of(flag: str, given: Sequence[str]) -> tuple[int, ...]:
    """The ranks in lists with commas, each once.

    >>> ranks_of("--rank", ["8,4", "16", "4"])
    (4, 8, 16)
    """
    return tuple(sorted({rank for text in given for rank in whole_numbers(flag, text)}))


def names_of(flag: str, text: str | None) -> tuple[str, ...]:
    """The names in a list with commas. Raises UsageError.

    >>> names_of("--modules-to-save", "score, classifier")
    ('score', 'classifier')
    """
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(flag, f"{str(text)[:40]!r} has an empty name", "give names with commas")
    return names


def print_result(
    report: Report,
    document: Callable[[Report], dict[str, Any]],
    view: Callable[[Report], View],
    *,
    json: bool,
    quiet: bool,
    following: str,
) -> None:
    """What was handed out, as it was asked for, and the command that follows the training."""
    if not quiet:
        warn(report.warnings)
    if json:
        typer.echo(to_json(document(report)), nl=False)
    elif not quiet:
        show(view(report))
    if not quiet:
        console = errors()
        say(console, "wrote", quoted(report.output), "bold green")
        say(console, "next", f"train from these; then {following}", "bold")
