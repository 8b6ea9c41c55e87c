"""Options that every command has, and how every command fails."""

from __future__ import annotations

import functools
import gc
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from fedlora_cli.errors import FedloraError, InputError, OutputError, UsageError
from fedlora_cli.files.interrupts import INTERRUPTED, leaving_at_once, raising
from fedlora_cli.files.locations import location
from fedlora_cli.remote import Location, StorageError
from fedlora_cli.render.terminal import on_terminal
from fedlora_cli.render.view import View
from fedlora_cli.text import printable

Parameters = ParamSpec("Parameters")


def option(*flags: str, help: str, panel: str | None = None, **kwargs: Any) -> Any:
    """An option in one of the panels of the help."""
    if panel is not None:
        kwargs["rich_help_panel"] = panel
    return typer.Option(*flags, help=help, show_default=kwargs.pop("show_default", False), **kwargs)


Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every module.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Null = Annotated[bool, typer.Option("--null", "-0", help="The list on stdin is NUL-separated.")]

ClientsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="CLIENTS",
        help="Adapter folders, or a folder of adapter folders, or - for a list on stdin.",
    ),
]
Counts = Annotated[
    str | None,
    option(
        "--samples",
        metavar="FILE",
        help="Sample counts: JSON object or CSV `client,samples`; default: from the folders.",
    ),
]
AdapterName = Annotated[
    str | None,
    option(
        "--adapter",
        metavar="NAME",
        help="Folder in every client's that holds its adapter; 'checkpoint-*': the last of them.",
    ),
]
Base = Annotated[str | None, option("--base", help="The base model, however the adapters name it.")]
Jobs = Annotated[int, option("--jobs", "-j", help="Modules at a time; default: all cores.")]

#: Every table fits into it.
TABLE_WIDTH = 80

#: The exit code of a command that found what it was asked to look out for.
FINDING = 1

#: The exit code of a program that a scheduler ended, with SIGTERM: 128 + 15.
TERMINATED = 143


def listed(paths: Sequence[str], *, null: bool) -> list[Location]:
    """The folders named; - stands for a list on standard input. Raises UsageError and
    InputError.
    """
    if "-" not in paths:
        return [location(path) for path in paths]
    if list(paths) != ["-"]:
        raise UsageError("CLIENTS", "- beside other folders", "put all of them into the list")
    # Paths are bytes: in any encoding, and with no standard input at all.
    try:
        content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        found = f"cannot be read ({reason})"
        raise InputError("standard input", found, "pipe one path per line") from None
    if b"\0" in content and not null:
        raise UsageError("standard input", "a NUL-separated list", "give --null")
    items = [item for item in content.split(b"\0" if null else b"\n") if item.strip()]
    if not items:
        raise UsageError("standard input", "no folders in the list", "pipe one path per line")
    return [location(os.fsdecode(item)) for item in items]


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """The numbers in a list with commas. Raises UsageError.

    >>> whole_numbers("--ranks", "4,8,16")
    (4, 8, 16)
    """
    return tuple(_whole(flag, item) for item in text.split(","))


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """The numbers in a list with commas. Raises UsageError.

    >>> numbers("--lr", "1e-3,0.5")
    (0.001, 0.5)
    """
    return tuple(number(flag, item) for item in text.split(","))


def number(flag: str, text: str) -> float:
    """One number of such a list. Raises UsageError."""
    try:
        return float(text)
    except ValueError:
        found = f"{text[:40]!r} is no number"
        raise UsageError(flag, found, "give numbers with commas between them") from None


def _whole(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        found = f"{text[:40]!r} is no number"
        raise UsageError(flag, found, "give whole numbers with commas between them") from None


def quoted(*arguments: object) -> str:
    """What a shell takes for these arguments.

    >>> quoted("my clients", "global")
    "'my clients' global"
    """
    return shlex.join(map(str, arguments))


def errors() -> Console:
    """Standard error: progress, warnings, advice."""
    return Console(stderr=True, soft_wrap=True)


def results() -> Console:
    """Standard output. Tables have their 80 columns even where the terminal has fewer: it wraps
    lines, where a narrower table would lose columns.
    """
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def warn(warnings: Sequence[str]) -> None:
    """What a person should know, line by line."""
    for warning in warnings:
        say(errors(), "warning", warning, "yellow")


def show(view: View) -> None:
    """The view on standard output."""
    console = results()
    console.print(on_terminal(view, plain=console.options.ascii_only))


def say(console: Console, label: str, text: str, style: str) -> None:
    """One line `label: text`, free of control characters, wrapped by nobody."""
    console.print(Text.assemble((f"{label}: ", style), printable(text)))


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch without looking for garbage meanwhile, nor among what it made when we end.

    Its objects live as long as the process. `time python -c "import torch"`, start to end, takes
    1.6 s this way and 2.3 s otherwise (torch 2.13, median of 3).
    """
    gc.disable()
    try:
        with leaving_at_once():
            yield
    finally:
        gc.freeze()
        gc.enable()


def guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A command whose foreseen failures are one line on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            with raising():
                command(*args, **kwargs)
        except FedloraError as error:
            fail(error, debug=bool(kwargs.get("debug")))
        except StorageError as error:  # in a mere look at what a place is
            found = f"cannot be read ({error})"
            fail(InputError(error.where, found, error.cure), debug=bool(kwargs.get("debug")))
        except KeyboardInterrupt:
            say(errors(), "error", "interrupted; nothing is half written", "bold red")
            raise typer.Exit(INTERRUPTED) from None
        except SystemExit as stop:
            if stop.code == TERMINATED:
                say(errors(), "error", "ended by SIGTERM; nothing is half written", "bold red")
            raise

    return run


def unwritten(error: OSError) -> NoReturn:
    """End a command whose work is done, but whose result could not be shown."""
    found = f"cannot be written ({(error.strerror or str(error)).lower()})"
    told = OutputError("standard output", found, "free some space")
    say(errors(), "error", str(told), "bold red")
    sys.exit(told.exit_code)


def fail(error: FedloraError, *, debug: bool) -> NoReturn:
    """End a command with an error, in one line."""
    if debug:
        traceback.print_exc()
    say(errors(), "error", str(error), "bold red")
    raise typer.Exit(error.exit_code) from None
