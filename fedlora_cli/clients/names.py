"""The clients' folders under their names, no folder and no name twice."""

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
    return named(folders, on_fault), left_out


def distinct_folders(
    paths: Sequence[Location], on_fault: FaultHandler, adapter: str | None
) -> tuple[list[Location], tuple[str, ...]]:
    """What `find_folders` finds, each once: one under two names, by a link for example, would vote
    twice.
    """
    folders, left_out = find_folders(paths, on_fault, adapter)
    first: dict[Location, Location] = {}
    # A link is at fault, not what it leads to.
    for folder in sorted(folders, key=lambda one: one.is_symlink()):
        same = first.setdefault(folder.resolve(), folder)
        if same is not folder:
            found = f"the same folder as {same}"
            on_fault(InputError(folder, found, "name every client once", {same: None}))
    return list(first.values()), left_out


def named(folders: Sequence[Location], on_fault: FaultHandler) -> list[tuple[str, Location]]:
    """The folders with the names of their clients. Faults go to `on_fault`."""
    result = [(_name(folder, on_fault), folder) for folder in folders]
    _check_names(result, on_fault)
    return result


def name_of(folder: Location) -> str:
    """The name of a folder, or of a file without its ending.

    Without the links resolved, a client has the name that it was given.
    """
    place = normal(folder)
    return place.stem if place.suffix and place.is_file() else place.name


def _name(folder: Location, on_fault: FaultHandler) -> str:
    """The name of a client, which reports must be able to write down."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        on_fault(InputError(folder, "a path that is not UTF-8", "rename the folder"))
    return name_of(folder)


def _check_names(named: Sequence[tuple[str, Location]], on_fault: FaultHandler) -> None:
    """Names that differ in case or in how Unicode spells them are one name to other systems.

    Either may be the one that took the name: it is nobody's fault, so not told as of a path.
    """
    first: dict[str, tuple[str, Location]] = {}
    for name, folder in named:
        alike, other = first.setdefault(_folded(name), (name, folder))
        if alike != name:
            found = f"a client named almost like {other}"
            cure = "give every client a name of its own, also without regard to case"
            on_fault(InputError(str(folder), found, cure, {other: None}))


def _folded(name: str) -> str:
    r"""What names have in common that some systems, and most people, cannot tell apart.

    >>> _folded("Zo\u00eb") == _folded("zoe\u0308")
    True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
