"""The adapter folders among the paths of the command line."""

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

#: The number of remarks about folders without an adapter.
_MOST_REMARKS = 20

#: The number of entries that are searched for an adapter to suggest in an error.
_MOST_SEARCHED = 1000


class Elsewhere(InputError):
    """The adapters of a folder are not where they are expected."""


def find_folders(
    paths: Sequence[Location], on_fault: FaultHandler = raise_fault, adapter: str | None = None
) -> tuple[list[Location], tuple[str, ...]]:
    """The adapters in `paths`, folders or files, and a remark for each child folder without one.

    With `adapter`, the result is the folders whose subfolder of that name holds an adapter. Hidden
    folders are skipped: unfinished output has a hidden name. Faults go to `on_fault`; a child whose
    adapters lie deeper is an `Elsewhere`. Raises UsageError for an `adapter` that is no name.
    """
    if adapter is not None and (adapter in ("", ".", "..") or set(adapter) & {"/", "\\", "\0"}):
        found = f"{adapter!r} is no name of a folder"
        cure = "give the subfolder of every client, or 'checkpoint-*' for the last checkpoint"
        raise UsageError("--adapter", found, cure)
    folders: list[Location] = []
    remarks: list[str] = []
    _prefetch(paths, adapter)
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
            names = [child.name for child in left_out[:_MOST_REMARKS]]
            remarks += [f"{name} left out: no adapter in it" for name in names]
            if more := len(left_out) - len(names):
                remarks.append(f"{more} more folders left out: no adapter in them")
    return folders, tuple(sorted(remarks))


def _check_links(folder: Location, home: Location, adapter: str | None) -> None:
    check_links(folder, home)
    if adapter is not None:
        check_linked_folder(formats.inside(folder, adapter), home)
        check_links(formats.inside(folder, adapter), home)


def _adapters_in(folder: Location) -> list[Location]:
    """The adapters in a folder in natural order; none if the folder cannot be read."""
    try:
        children = islice(_visible(folder), _MOST_SEARCHED)
        adapters = [child for child in children if formats.is_adapter(child)]
    except (OSError, InputError):
        return []
    return sorted(adapters, key=lambda child: natural(child.name))


def _folder_names(adapters: Sequence[Location]) -> list[str]:
    """The names of the folders among the adapters: a file may be part of a base model."""
    return [adapter.name for adapter in adapters if adapter.is_dir()]


def _visible(folder: Location) -> Iterator[Location]:
    """The children of a folder without a hidden name. Raises OSError."""
    if isinstance(folder, Remote):
        yield from (child for child in folder.iterdir() if not child.name.startswith("."))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                yield Path(entry.path)


def _elsewhere(folder: Location, adapter: str | None) -> Elsewhere | None:
    """The error of a folder whose adapters are elsewhere; None if it has no adapters."""
    if adapter is not None and formats.is_adapter(folder):
        found = f"no adapter named {adapter} in it, but the folder itself is an adapter"
        cure = "leave it out, or give --adapter only if every client has it"
        return Elsewhere(folder, found, cure)
    adapters = _adapters_in(folder)
    if not adapters:
        return None
    found = f"no adapter {'in it' if adapter is None else f'named {adapter} in it'}, but "
    folders = _folder_names(adapters)
    if not folders:
        found += f"files that may be adapters: {shortened([file.name for file in adapters])}"
        return Elsewhere(folder, found, "name this folder if each is a client, or move it away")
    found += f"in its subfolders: {shortened(folders)}"
    cure = f"give --adapter {_option_value(folders)} if they belong to one client, name this folder"
    return Elsewhere(folder, found, f"{cure} if each is a client, or move it away")


def _option_value(folders: Sequence[str]) -> str:
    """The value of --adapter that takes the last of these folders.

    >>> _option_value(["checkpoint-9", "checkpoint-10"]), _option_value(["mine"])
    ("'checkpoint-*'", 'mine')
    """
    stem = folders[-1].rstrip("0123456789")
    return f"'{stem}*'" if stem.endswith("-") and stem != folders[-1] else folders[-1]


def _suggestion(folders: Sequence[Location]) -> str:
    """The beginning of a cure that names the adapters below these folders; empty without any."""
    places = (place for folder in folders for place in (folder, *folder.glob("[!.]*")))
    searched = islice(places, _MOST_SEARCHED)
    deeper = max(searched, key=lambda place: len(_adapters_in(place)), default=None)
    adapters = [] if deeper is None else _adapters_in(deeper)
    if deeper is None or not adapters:
        return ""
    names = _folder_names(adapters)
    if deeper in folders and names and _option_value(names) != names[-1]:
        return f"{deeper.name} has {shortened(names)}: give --adapter {_option_value(names)}, or "
    return f"did you mean {deeper}? "


def _children(
    path: Location, on_fault: FaultHandler, adapter: str | None
) -> tuple[list[Location], list[Location]]:
    """The adapters among the visible children of a folder, and the folders without an adapter.

    A broken link is an unreadable client. Raises InputError.
    """
    faults: list[InputError] = []
    on_child_fault = recording(on_fault, faults)
    try:
        visible = sorted(islice(_visible(path), MAX_ENTRIES + 1), key=lambda child: child.parts)
        if len(visible) > MAX_ENTRIES:
            found = f"more than {MAX_ENTRIES} files and folders in it"
            raise InputError(path, found, "name the adapter folders themselves")
        for child in visible:
            if child.is_symlink() and not child.exists():
                on_child_fault(InputError(child, "a broken link", "mend the link or remove it"))
    except NotADirectoryError:
        raise InputError(path, "not a folder", "name the folder that it lies in") from None
    except OSError as error:
        raise unreadable(path, error) from None
    adapters: list[Location] = []
    others: list[Location] = []
    _prefetch(visible, adapter)
    for child in visible:
        with catching_faults(on_child_fault):
            if formats.is_adapter(formats.inside(child, adapter)):
                adapters.append(child)
            elif child.is_dir() or formats.is_adapter(child):
                others.append(child)
    if not adapters and not faults:
        found = "no adapters in it" if adapter is None else f"no adapters named {adapter} in it"
        cure = "name adapter folders, or a folder whose children are adapter folders"
        raise InputError(path, found, _suggestion(others) + cure)
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


def _prefetch(places: Sequence[Location], adapter: str | None) -> None:
    """Look at remote places in parallel, so that the answers are cached."""

    def look(place: Location) -> None:
        with suppress(OSError, InputError):  # raised again when the place is used
            formats.is_adapter(formats.inside(place, adapter))

    for answer in prefetched(look, [place for place in places if isinstance(place, Remote)]):
        answer()
