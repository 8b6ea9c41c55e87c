"""Paths on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.files.locations import location
from fedlora_cli.remote import Location

FOLDERS = "Adapter folders, a folder of adapter folders, or - for a list on standard input."

Clients = Annotated[list[str], typer.Argument(metavar="CLIENTS", help=FOLDERS)]
Paths = Annotated[list[str], typer.Argument(metavar="PATHS", help=FOLDERS)]
Folders = Annotated[
    str,
    typer.Option("--output", "-o", metavar="DIR", help="Folder for the folders of all adapters."),
]
Like = Annotated[
    list[str] | None,
    typer.Option(
        "--like",
        metavar="CLIENTS",
        help="Folders of adapters, or of folders of adapters, to take the ranks and names from; "
        "repeatable; - for a list on standard input.",
    ),
]
Null = Annotated[bool, typer.Option("--null", "-0", help="Paths on standard input end with NUL.")]


def listed(paths: Sequence[str], *, null: bool) -> list[Location]:
    """The locations of the paths; - stands for a list on standard input. Raises UsageError and
    InputError.
    """
    if "-" not in paths:
        return [location(path) for path in paths]
    if list(paths) != ["-"]:
        raise UsageError("CLIENTS", "- beside other folders", "put all of them into the list")
    # Paths are bytes, in any encoding, and standard input may be closed.
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
