"""The adapters in what the person named on the command line, whatever else lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from fedlora_cli import formats
from fedlora_cli.clients.sample_counts import COUNT_FILES
from fedlora_cli.errors import (
    FaultHandler,
    InputError,
    UsageError,
    catching_faults,
    raise_fault,
    recording,
)
from fedlora_cli.files.documents import exists
from fedlora_cli.files.links import check_linked_folder, check_links
from fedlora_cli.files.untrusted import unreadable
from fedlora_cli.remote import Location, Remote, prefetched
from fedlora_cli.text import natural, shortened

#: Far more clients than take part in any round.
MAX_ENTRIES = 100_000

#: Of folders without an adapter: how many remarks there are, and how many places are looked at for
#: one that may have been meant.
_TOLD = 20
_GLANCE = 1000


class Elsewhere(InputError):
    """A folder has adapters, but not where they are looked for."""


def find_folders(
    paths: Sequence[Location], on_fault: FaultHandler = raise_fault, adapter: str | None = None
) -> tuple[list[Location], tuple[str, ...]]:
    """The adapters in `paths`, folders or files, and a remark about every child folder without one.

    With `adapter`, they are the folders that each hold an adapter in a folder of that name. Hidden
    ones are not looked at: unfinished output has a hidden name. Faults go to `on_fault`; a child
    whose adapters are deeper is an `Elsewhere`. Raises UsageError for an `adapter` that is no name.
    """
    if adapter is not None and (adapter in ("", ".", "..") or set(adapter) & {"/", "\\", "\0"}):
        found = f"{adapter!r} is no name of a folder"
        cure = "give the name in every client's folder, or 'checkpoint-*' for the last of them"
        raise UsageError("--adapter", found, cure)
    folders: list[Location] = []
    remarks: list[str] = []
    _look_ahead(paths, adapter)
    for path in paths:
        with catching_faults(on_fault):
            if formats.is_adapter(formats.inside(path, adapter)):
                _check_links(path, path, adapter)
                folders.append(path)
                continue
            inside, left_out = _children(path, on_fault, adapter)
            for child in inside:
                with catching_faults(on_fault):
                    check_linked_folder(child, path)
                    _check_links(child, path, adapter)
                    folders.append(child)
            remarks += [f"{child.name} left out: no adapter in it" for child in left_out[:_TOLD]]
            if left_out[_TOLD:]:
                remarks.append(f"{len(left_out) - _TOLD} more folders left out: no adapter in them")
    return folders, tuple(sorted(remarks))


def _check_links(folder: Location, home: Location, adapter: str | None) -> None:
    check_links(folder, home)
    if adapter is not None:
        check_linked_folder(formats.inside(folder, adapter), home)
        check_links(formats.inside(folder, adapter), home)


def _held(folder: Location) -> list[Location]:
    """The adapters in a folder, as far as it can be looked at; 9 before 10."""
    try:
        held = [one for one in islice(_visible(folder), _GLANCE) if formats.is_adapter(one)]
    except (OSError, InputError):
        return []
    return sorted(held, key=lambda one: natural(one.name))


def _folders(held: Sequence[Location]) -> list[str]:
    """The names of those that are folders: a file may be a base model's as well."""
    return [one.name for one in held if one.is_dir()]


def _visible(folder: Location) -> Iterator[Location]:
    """What is in a folder under a name that is not hidden. Raises OSError."""
    if isinstance(folder, Remote):
        yield from (one for one in folder.iterdir() if not one.name.startswith("."))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                yield Path(entry.path)


def _elsewhere(folder: Location, adapter: str | None) -> Elsewhere | None:
    """The error of a folder with other adapters than the one that is looked for."""
    if adapter is not None and formats.is_adapter(folder):
        found = f"no adapter named {adapter} in it, but it is one itself"
        return Elsewhere(folder, found, "leave it out, or give --adapter only where all have it")
    held = _held(folder)
    if not held:
        return None
    found = f"no adapter {'itself' if adapter is None else f'named {adapter} in it'}, but "
    inside = _folders(held)
    if not inside:
        found += f"files of it may be some: {shortened([one.name for one in held])}"
        return Elsewhere(folder, found, "name this folder if each is a client, or move it away")
    found += f"in folders of it: {shortened(inside)}"
    cure = f"give --adapter {_named(inside)} if these are of one client, name this folder if each "
    return Elsewhere(folder, found, f"{cure}is a client, or move it away")


def _named(held: Sequence[str]) -> str:
    """What to give as --adapter for the last of these.

    >>> _named(["checkpoint-9", "checkpoint-10"]), _named(["mine"])
    ("'checkpoint-*'", 'mine')
    """
    stem = held[-1].rstrip("0123456789")
    return f"'{stem}*'" if stem.endswith("-") and stem != held[-1] else held[-1]


def _guess(folders: Sequence[Location]) -> str:
    """What may have been meant where no adapter is, but where there are some deeper."""
    places = (place for folder in folders for place in (folder, *folder.glob("[!.]*")))
    deeper = max(islice(places, _GLANCE), key=lambda place: len(_held(place)), default=None)
    held = [] if deeper is None else _held(deeper)
    if deeper is None or not held:
        return ""
    inside = _folders(held)
    if deeper in folders and inside and _named(inside) != inside[-1]:
        return f"{deeper.name} has {shortened(inside)}: give --adapter {_named(inside)}, or "
    return f"did you mean {deeper}? "


def _children(
    path: Location, on_fault: FaultHandler, adapter: str | None
) -> tuple[list[Location], list[Location]]:
    """The adapters among the visible folders and files in a folder, and the rest of the folders.

    A link to nothing is a client that cannot be read. Raises InputError.
    """
    refused: list[InputError] = []
    told = recording(on_fault, refused)
    try:
        visible = sorted(islice(_visible(path), MAX_ENTRIES + 1), key=lambda one: one.parts)
        if len(visible) > MAX_ENTRIES:
            found = f"more than {MAX_ENTRIES} files and folders in it"
            raise InputError(path, found, "name the adapter folders themselves")
        for child in visible:
            if child.is_symlink() and not child.exists():
                told(InputError(child, "a link to nothing", "mend the link or remove it"))
    except NotADirectoryError:
        raise InputError(path, "not a folder", "name the folder that it lies in") from None
    except OSError as error:
        raise unreadable(path, error) from None
    adapters: list[Location] = []
    others: list[Location] = []
    _look_ahead(visible, adapter)
    for child in visible:
        with catching_faults(told):
            if formats.is_adapter(formats.inside(child, adapter)):
                adapters.append(child)
            elif child.is_dir() or formats.is_adapter(child):
                others.append(child)
    if not adapters and not refused:
        found = "no adapters in it" if adapter is None else f"no adapters named {adapter} in it"
        cure = "name adapter folders, or a folder whose children are adapter folders"
        raise InputError(path, found, _guess(others) + cure)
    left_out: list[Location] = []
    for child in others:
        elsewhere = _elsewhere(child, adapter)
        if elsewhere is not None:
            on_fault(elsewhere)
        elif any(exists(child / file) for file, _ in COUNT_FILES):
            found = "a client's sample count, but no adapter"
            on_fault(InputError(child, found, "wait until it is uploaded, or move it away"))
        else:
            left_out.append(child)
    return adapters, left_out


def _look_ahead(places: Sequence[Location], adapter: str | None) -> None:
    """Ask a store for what is in all of these, many at a time; what it says is then known."""

    def look(place: Location) -> None:
        with suppress(OSError, InputError):  # whoever wants it is told
            formats.is_adapter(formats.inside(place, adapter))

    for answer in prefetched(look, [place for place in places if isinstance(place, Remote)]):
        answer()
