"""Symbolic links in folders that clients uploaded: which targets are allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedlora_cli.errors import InputError
from fedlora_cli.files.untrusted import unreadable
from fedlora_cli.remote import Location, Remote


def check_links(folder: Location, home: Location) -> None:
    """Raise InputError if a link in `folder` leads out of it.

    Allowed targets are `folder`, `home` (the folder named on the command line) and, for a snapshot
    in a Hugging Face cache, its blobs. Any other link would let a client read files of the server.
    Broken links are not checked here.
    """
    for link in _links(folder):
        target = _real(link)
        inside = any(_real(place) in target.parents for place in (folder, home))
        if not inside and not _is_blob(target, _real(folder)):
            cure = "put the file itself there"
            raise _leads_out(link, target, cure)


def check_linked_folder(folder: Location, home: Location) -> None:
    """Raise InputError if `folder`, found in `home`, is a link that leads out of `home`.

    A link from a snapshot in a Hugging Face cache to its blobs is allowed.
    """
    if not folder.is_symlink():
        return
    target = _real(folder)
    if _real(home) not in target.parents and not _is_blob(target, _real(folder.parent)):
        raise _leads_out(folder, target, "name that itself on the command line")


def _leads_out(link: Location, target: Location, cure: str) -> InputError:
    """The error for a link. Reports omit the target, because they may reach the client."""
    found = f"a link that leads out of the folder, to {target}"
    return InputError(link, found, cure, {target: "elsewhere"})


def _links(folder: Location) -> Iterator[Path]:
    """The links to files in a local folder. Raises InputError."""
    if isinstance(folder, Remote) or folder.is_file():
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not entry.is_dir():
                    yield Path(entry.path)
    except OSError as error:
        raise unreadable(folder, error) from None


def _is_blob(target: Location, folder: Location) -> bool:
    """Whether `target` is in the `blobs` of the cache whose `snapshots` hold `folder`.

    >>> _is_blob(Path("/hub/m/blobs/1f"), Path("/hub/m/snapshots/main"))
    True
    """
    caches = [place.parent for place in folder.parents if place.name == "snapshots"]
    return any(target.parent == cache / "blobs" for cache in caches)


def _real(path: Location) -> Location:
    """The path with all links resolved. Raises InputError."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, Python < 3.13
        problem = error if isinstance(error, OSError) else OSError(str(error))
        raise unreadable(path, problem) from None
