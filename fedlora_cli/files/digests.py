"""SHA-256 of files, as `sha256sum` prints it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedlora_cli.files.untrusted import State, opened
from fedlora_cli.remote import Location


def sha256_of(path: Location, state: State | None = None) -> str:
    """Of one file, whole and in one state: the given one, if there is one. Raises InputError."""
    total = hashlib.sha256()
    with opened(path, state) as file:
        for block in file.blocks():
            total.update(block)
    return total.hexdigest()


def sha256_of_all(folder: Path) -> dict[str, str]:
    """Of every file in a folder, by name. Raises InputError and OSError."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
