"""The command, run as a pipeline and as a person run it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

from fedlora_cli.cli import app


def run(
    *arguments: object, stdin: str | bytes | None = None, env: Mapping[str, str] | None = None
) -> Result:
    """The result of `fedlora ARGUMENTS`, run in this process without a terminal.

    Raises any exception but SystemExit, because the command must not end by it.
    """
    command = list(map(str, arguments))
    result = CliRunner().invoke(app, command, prog_name="fedlora", input=stdin, env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def on_a_terminal(folder: Path, arguments: list[str], **environment: str) -> str:
    """What a command prints when its output is a terminal."""
    main, terminal = pty.openpty()
    ours = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlora_cli", *arguments],
        cwd=folder,
        env=ours | {"TERM": "xterm-256color"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    output = b""
    with open(main, "rb", buffering=0) as screen:  # noqa: PTH123 (a descriptor, not a path)
        try:
            while block := screen.read(65536):
                output += block
        except OSError:  # how Linux says that the other end is closed
            pass
    assert process.wait() == 0
    return output.decode()
