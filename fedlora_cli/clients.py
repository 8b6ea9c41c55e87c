"""From what the person named on the command line to a cohort: folders, names, sample counts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora_cli import formats
from fedlora_cli.adapter import Adapter, Facts
from fedlora_cli.cohort import Client, Cohort, align
from fedlora_cli.counts import COUNT_FILES, counts_from_file, counts_from_folders
from fedlora_cli.errors import InputError, Report, keeping, refuse, reporting
from fedlora_cli.files.documents import exists, unreadable

#: What the public functions take for their clients: one folder, or several.
Paths = Path | str | Sequence[Path | str]


def paths_of(given: Paths) -> list[Path]:
    """The folders given, one alone among them.

    >>> paths_of("round-01") == paths_of([Path("round-01")])
    True
    """
    return [Path(one) for one in ([given] if isinstance(given, (str, Path)) else given)]


_UNIFORM = "no sample counts found, all clients count the same; --samples FILE gives them"


@dataclass(frozen=True, eq=False)
class Clients:
    """A cohort and how it was found: `remarks` are for the person, `uniform` says that nobody
    told a sample count, of which `remarks` speaks as well.
    """

    cohort: Cohort
    remarks: tuple[str, ...]
    uniform: bool


def read_clients(
    paths: Sequence[Path],
    samples: Path | None = None,
    base_model: str | None = None,
    report: Report = refuse,
) -> Clients:
    """The clients in `paths`: adapter folders, or folders whose children are adapter folders.

    Sample counts come from the file `samples` (a JSON object, or CSV `client,samples`), else from
    the client's folder (`COUNT_FILES`), else all clients count the same.

    Every fault goes to `report`. If that returns, the clients are what is left without it, and all
    count the same where a count is at fault. Raises InputError where no folder is left.
    """
    refused: list[InputError] = []
    named, left_out = name_folders(paths, keeping(report, refused))
    if not named:
        raise refused[0]
    adapters = [_read(folder, report) for _, folder in named]
    names, folders = [name for name, _ in named], [folder for _, folder in named]
    counts: dict[str, float] | None = None
    with reporting(report):
        if samples:
            counts = counts_from_file(samples, names, refused, report)
        else:
            counts = counts_from_folders(folders, names, report)
    clients = [
        Client(name, adapter, counts[name] if counts else 1.0)
        for name, adapter in zip(names, adapters, strict=True)
    ]
    cohort = align(clients, base_model, report)
    uniform = counts is None
    return Clients(cohort, (*([_UNIFORM] if uniform else []), *left_out), uniform)


def name_folders(
    paths: Sequence[Path], report: Report = refuse
) -> tuple[list[tuple[str, Path]], tuple[str, ...]]:
    """The adapter folders in `paths` with the names of their clients, and remarks.

    Faults go to `report`.
    """
    folders, left_out = find_folders(paths, report)
    return [(_name(folder, report), folder) for folder in _distinct(folders, report)], left_out


def _name(folder: Path, report: Report) -> str:
    """The name of the folder, which reports and cards must be able to write down."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        report(InputError(folder, "a path that is not UTF-8", "rename the folder"))
    # Without the links resolved, a client has the name that it was given.
    return Path(os.path.normpath(folder.absolute())).name


def _distinct(folders: Sequence[Path], report: Report) -> list[Path]:
    """One folder under two names, by a link for example, would vote twice."""
    first: dict[Path, Path] = {}
    for folder in folders:
        same = first.setdefault(folder.resolve(), folder)
        if same is not folder:
            found = f"the same folder as {same}"
            report(InputError(folder, found, "name every client once"))
    return list(first.values())


def _read(folder: Path, report: Report) -> Adapter:
    """The adapter in the folder; with nothing in it where not even that can be looked at."""
    with reporting(report):
        return formats.read(folder, report)
    return Adapter(folder, folder, {}, {}, Facts())


def find_folders(
    paths: Sequence[Path], report: Report = refuse
) -> tuple[list[Path], tuple[str, ...]]:
    """The adapter folders in `paths`, and a remark about every child folder without an adapter.

    Hidden folders are not looked at: unfinished output has a hidden name. Faults go to `report`.
    """
    folders: list[Path] = []
    remarks: list[str] = []
    for path in paths:
        with reporting(report):
            if formats.is_adapter(path):
                folders.append(path)
                continue
            inside, left_out = _children(path, report)
            folders += inside
            remarks += [_remark(child) for child in left_out]
    return folders, tuple(sorted(remarks))


def _held(folder: Path) -> int:
    """How many adapters stand in a folder, as far as it can be looked at: this is for a remark."""
    try:
        inside = [child for child in folder.iterdir() if not child.name.startswith(".")]
        return sum(map(formats.is_adapter, inside))
    except (OSError, InputError):
        return 0


def _remark(folder: Path) -> str:
    held = _held(folder)
    if held:
        return f"{folder.name} left out: it holds {held} adapters itself; name that folder for them"
    return f"{folder.name} left out: no adapter in it"


def _children(path: Path, report: Report) -> tuple[list[Path], list[Path]]:
    """The adapters among the visible folders in a folder, and the rest of them.

    A link to nothing is a client that cannot be read. Raises InputError.
    """
    refused: list[InputError] = []
    told = keeping(report, refused)
    try:
        visible = sorted(child for child in path.iterdir() if not child.name.startswith("."))
        for child in visible:
            if child.is_symlink() and not child.exists():
                told(InputError(child, "a link to nothing", "mend the link or remove it"))
        children = [child for child in visible if child.is_dir()]
    except NotADirectoryError:
        raise InputError(path, "not a folder", "name the folder that it lies in") from None
    except OSError as error:
        raise unreadable(path, error) from None
    adapters: list[Path] = []
    others: list[Path] = []
    for child in children:
        with reporting(told):
            (adapters if formats.is_adapter(child) else others).append(child)
    if not adapters and not refused:
        places = (place for child in children for place in (child, *child.glob("[!.]*")))
        deeper = max(places, key=_held, default=None)
        guess = f"did you mean {deeper}? " if deeper is not None and _held(deeper) else ""
        cure = "name adapter folders, or a folder whose children are adapter folders"
        raise InputError(path, "no adapters in it", guess + cure)
    left_out: list[Path] = []
    for child in others:
        if any(exists(child / file) for file, _ in COUNT_FILES):
            found = "a client's sample count, but no adapter"
            report(InputError(child, found, "wait until it is uploaded, or move it away"))
        else:
            left_out.append(child)
    return adapters, left_out
