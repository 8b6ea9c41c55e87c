"""The command `fedlora`: a table of commands, each imported when it is called."""

from __future__ import annotations

import functools
import inspect
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fedlora_cli.cli.command import fail, unwritten
from fedlora_cli.cli.streams import failure_of, secure_streams
from fedlora_cli.errors import UsageError
from fedlora_cli.files.documents import unwritable
from fedlora_cli.version import __version__

_SUMMARY = "Aggregate federated LoRA adapters of different ranks, and detect rank collapse."

#: The commands: the first line of their help. `fedlora_cli.cli.NAME.NAME` is the function of each.
COMMANDS = {
    "init": "Start a federation: one initial adapter for all clients, cut to every rank.",
    "aggregate": "Aggregate client adapters of different ranks into one global PEFT adapter.",
    "diagnose": "Show whether adapters collapse in rank, why, and how fast.",
    "distribute": "Cut the global adapter to the rank of each client, to train from.",
    "predict": "Predict coverage, weights and rank collapse of each method before any training.",
    "compare": "Show the result of every method for the same clients.",
    "simulate": "Train whole federations and compare methods, learning rates and seeds.",
    "inspect": "Show the contents of adapters, their differences, and all their faults.",
    "methods": "List the aggregation methods with their weights and papers.",
}


@functools.cache
def load(name: str) -> Any:
    """The command of that name, with its options."""
    function = getattr(import_module(f"fedlora_cli.cli.{name}"), name)
    alone = typer.Typer(add_completion=False)
    alone.command(name, help=f"{COMMANDS[name]}\n\n{inspect.getdoc(function)}")(function)
    return typer.main.get_command(alone)


class _Commands(TyperGroup):
    """The commands without their options, until one of them is called."""

    def resolve_command(self, *args: Any) -> Any:
        name, command, rest = super().resolve_command(*args)
        return name, command if name is None else load(name), rest

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except typer.Exit as stop:
            # Typer ends with 1 for an unknown shell, which is the code of a finding here.
            raise typer.Exit(UsageError.exit_code if stop.exit_code else 0) from None
        except OSError as error:  # while completion is installed
            fail(unwritable(Path(error.filename or "completion"), error), debug=False)


app = typer.Typer(
    name="fedlora",
    cls=_Commands,
    help=_SUMMARY,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A mistake in this program is a plain traceback, without the tensors in it.
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fedlora {__version__}")
        raise typer.Exit


@app.callback(help=_SUMMARY)
def fedlora(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command. SIGTERM and SIGHUP end it like a failure, so that temporary files are
    removed.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # not every system has both
            signal.signal(getattr(signal, name), _stop)
    secure_streams()
    try:
        app(prog_name="fedlora")
    except SystemExit as stop:
        failure = failure_of(sys.stdout)
        if stop.code or failure is None:
            raise
        unwritten(failure)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
