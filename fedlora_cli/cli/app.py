"""The command `fedlora` and what all of its commands share."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fedlora_cli.cli.aggregate import aggregate
from fedlora_cli.cli.compare import compare
from fedlora_cli.cli.diagnose import diagnose
from fedlora_cli.cli.distribute import distribute
from fedlora_cli.cli.init import initialize
from fedlora_cli.cli.inspect import inspect
from fedlora_cli.cli.methods import methods
from fedlora_cli.cli.predict import predict
from fedlora_cli.cli.shared import fail, unwritten
from fedlora_cli.cli.simulate import simulate
from fedlora_cli.cli.streams import failure_of, secure_streams
from fedlora_cli.errors import UsageError
from fedlora_cli.files.documents import unwritable
from fedlora_cli.version import __version__


class _Commands(TyperGroup):
    """The commands, and what typer itself does before any of them: installing completion."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except typer.Exit as stop:
            # To typer, that a shell is unknown is a 1, which here is the code of a finding.
            raise typer.Exit(UsageError.exit_code if stop.exit_code else 0) from None
        except OSError as error:
            fail(unwritable(Path(error.filename or "completion"), error), debug=False)


app = typer.Typer(
    name="fedlora",
    cls=_Commands,
    help="Aggregate federated LoRA adapters of different ranks, and see whether they collapse.",
    context_settings={"help_option_names": ["-h", "--help"]},
    # A mistake in this program is one plain traceback, without the tensors in it.
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command("init")(initialize)
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
    """The command. Being asked to stop ends it like any failure: nothing is left behind."""
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
