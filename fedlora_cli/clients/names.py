"""The names of the clients' folders; every folder and every name occurs once."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from fedlora_cli.clients.discovery import find_folders
from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.remote import Location, normal


def name_folders(
    paths: Sequence[Location], on_fault: FaultHandler = raise_fault, adapter: str | None = None
) -> tuple[list[tuple[str, Location]], tuple[str, ...]]:
    """The adapter folders in `paths` with the names of their clients, and remarks.

    Faults go to `on_fault`; `adapter` is as in `find_folders`.
    """
    folders, left_out = distinct_folders(paths, on_fault, adapter)
    return name_clients(folders, on_fault), left_out


def distinct_folders(
    paths: Sequence[Location], on_fault: FaultHandler, adapter: str | None
) -> tuple[list[Location], tuple[str, ...]]:
    """The folders of `find_folders`, each once: a second path, such as a link, would count a client
    twice.
    """
    folders, left_out = find_folders(paths, on_fault, adapter)
    first: dict[Location, Location] = {}
    # The link is at fault, not its target.
    for folder in sorted(folders, key=lambda folder: folder.is_symlink()):
        same = first.setdefault(folder.resolve(), folder)
        if same is not folder:
            found = f"the same folder as {same}"
            on_fault(InputError(folder, found, "name every client once", {same: None}))
    return list(first.values()), left_out


def name_clients(folders: Sequence[Location], on_fault: FaultHandler) -> list[tuple[str, Location]]:
    """The folders with the names of their clients. Faults go to `on_fault`."""
    named = [(_name(folder, on_fault), folder) for folder in folders]
    _check_names(named, on_fault)
    return named


def name_of(folder: Location) -> str:
    """The name of a folder, or of a file without its ending. Links are not resolved."""
    place = normal(folder)
    return place.stem if place.suffix and place.is_file() else place.name


def _name(folder: Location, on_fault: FaultHandler) -> str:
    """The name of a client; a path that a report cannot contain is a fault."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        on_fault(InputError(folder, "a path that is not UTF-8", "rename the folder"))
    return name_of(folder)


def _check_names(named: Sequence[tuple[str, Location]], on_fault: FaultHandler) -> None:
    """Report names that differ in case or Unicode spelling alone: some systems take them for one.

    Either client may have copied the name, so the fault names no path and belongs to no client.
    """
    first: dict[str, tuple[str, Location]] = {}
    for name, folder in named:
        alike, other = first.setdefault(folded(name), (name, folder))
        if alike != name:
            found = f"a client named almost like {other}"
            cure = "give clients names that differ in more than case"
            on_fault(InputError(str(folder), found, cure, {other: None}))


def folded(name: str) -> str:
    r"""A form that is equal for names that some systems cannot tell apart.

    >>> folded("Zo\u00eb") == folded("zoe\u0308")
    True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
