"""The command `fedlora` and what all of its commands share."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from fedlora_cli.cli.aggregate import aggregate
from fedlora_cli.cli.compare import compare
from fedlora_cli.cli.diagnose import diagnose
from fedlora_cli.cli.distribute import distribute
from fedlora_cli.cli.initialise import initialise
from fedlora_cli.cli.inspect import inspect
from fedlora_cli.cli.methods import methods
from fedlora_cli.cli.predict import predict
from fedlora_cli.cli.simulate import simulate
from fedlora_cli.version import __version__

app = typer.Typer(
    name="fedlora",
    help="Aggregate federated LoRA adapters of different ranks, and see whether they collapse.",
    context_settings={"help_option_names": ["-h", "--help"]},
    # A mistake in this program is one plain traceback, without the tensors in it.
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command("init")(initialise)
for command in (aggregate, diagnose, distribute, predict, compare, simulate, inspect, methods):
    app.command()(command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fedlora {__version__}")
        raise typer.Exit


@app.callback()
def fedlora(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Aggregate federated LoRA adapters of different ranks, and see whether they collapse."""


def main() -> None:
    """The console script. Being asked to stop ends it like any failure: nothing is left behind."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # not every system has both
            signal.signal(getattr(signal, name), _stop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character shows its escape.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="fedlora")


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
