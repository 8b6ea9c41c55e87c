"""Symbolic links in folders that somebody else filled: where they may lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedlora_cli.errors import InputError
from fedlora_cli.files.untrusted import unreadable
from fedlora_cli.remote import Location, Remote


def check_links(folder: Location, home: Location) -> None:
    """Whether every link among the files of `folder` leads to a file in it, or in `home`, the
    folder that the person named; or, from a snapshot in a Hugging Face cache, to its blobs.

    What a link in an upload leads to otherwise is not the client's to show. A link to nothing is no
    business of this function. Raises InputError.
    """
    for link in _links(folder):
        target = _real(link)
        inside = any(_real(place) in target.parents for place in (folder, home))
        if not inside and not _is_blob(target, _real(folder)):
            cure = "put the file itself there"
            raise _leads_out(link, target, cure)


def check_linked_folder(folder: Location, home: Location) -> None:
    """Whether a folder or file that was found in `home` is there itself, or linked from elsewhere
    in it; a file, from a snapshot in a Hugging Face cache, to its blobs too. Raises InputError.
    """
    if not folder.is_symlink():
        return
    target = _real(folder)
    if _real(home) not in target.parents and not _is_blob(target, _real(folder.parent)):
        raise _leads_out(folder, target, "name that itself on the command line")


def _leads_out(link: Location, target: Location, cure: str) -> InputError:
    """The error of a link. Where it leads is for the person at this machine: a report may reach
    who made the link.
    """
    found = f"a link that leads out of the folder, to {target}"
    return InputError(link, found, cure, {target: "elsewhere"})


def _links(folder: Location) -> Iterator[Path]:
    """The links in a folder that lead to no folder; none in a file, or in a store. Raises
    InputError.
    """
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
    """Whether a file lies in `blobs` beside the `snapshots` that the folder lies in.

    >>> _is_blob(Path("/hub/m/blobs/1f"), Path("/hub/m/snapshots/main"))
    True
    """
    caches = [place.parent for place in folder.parents if place.name == "snapshots"]
    return any(target.parent == cache / "blobs" for cache in caches)


def _real(path: Location) -> Location:
    """The path without links in it. Raises InputError."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, up to Python 3.12
        problem = error if isinstance(error, OSError) else OSError(str(error))
        raise unreadable(path, problem) from None
