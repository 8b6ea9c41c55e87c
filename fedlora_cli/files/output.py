"""Single output files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from fedlora_cli.errors import OutputError, UsageError
from fedlora_cli.files.disk import flush, is_mounted, temporary_folder
from fedlora_cli.files.documents import unwritable


def check_file(target: Path, flag: str, suffixes: Collection[str]) -> None:
    """Check, before the work for it, that a file can be written or replaced at `target`.

    Raises UsageError for a suffix that is not in `suffixes`, and OutputError.
    """
    if target.suffix.lower() not in suffixes:
        raise UsageError(flag, f"{target} has no known ending", f"use one of {' '.join(suffixes)}")
    if not target.parent.is_dir():
        raise OutputError(target, "its parent folder does not exist", f"mkdir -p {target.parent}")
    if target.exists() and not target.is_file():
        raise OutputError(target, "it exists and is not a file", "choose another name")
    place = target.resolve()
    if is_mounted(place):
        raise OutputError(target, "a mounted file, which cannot be replaced", "mount its folder")
    if not os.access(place.parent, os.W_OK):
        found = f"{place.parent} is not writable, or on a read-only file system"
        raise OutputError(target, found, "check its permissions")


def write_file(target: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new. Raises OutputError.

    If `target` is a link, the file that it leads to is replaced.
    """
    target = target.resolve()
    try:
        with temporary_folder(f".{target.name}.tmp-", target.parent) as folder:
            temporary = folder / target.name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                flush(file.fileno())
            temporary.replace(target)
    except OSError as error:
        raise unwritable(target, error) from None
