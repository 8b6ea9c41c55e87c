"""SHA-256 digests of files, in hexadecimal."""

from __future__ import annotations

import hashlib

from fedlora_cli.files.untrusted import State, opened
from fedlora_cli.remote import Location, in_order


def sha256_of(path: Location, state: State | None = None) -> str:
    """The digest of a file. Raises InputError if the file changes, or is not in `state`."""
    total = hashlib.sha256()
    with opened(path, state) as file:
        for block in file.blocks():
            total.update(block)
    return total.hexdigest()


def sha256_of_all(folder: Location) -> dict[str, str]:
    """The digest of every file in a folder, by file name. Raises InputError and OSError."""
    return {path.name: sha256_of(path) for path in in_order(folder)}
