"""From what the person named on the command line to a cohort: folders, names, sample counts."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_cli import formats
from fedlora_cli.cohort import Client, Cohort, align
from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import exists, parse_object, read_bytes, read_object, unreadable

#: Where a client's own folder may tell its sample count, first found wins: fedlora's own file, then
#: those of the Hugging Face Trainer.
COUNT_FILES = (
    ("fedlora.json", "samples"),
    ("all_results.json", "train_samples"),
    ("train_results.json", "train_samples"),
)


#: More samples than any client has; beyond it, sums would no longer be exact.
MOST_SAMPLES = 1e12


@dataclass(frozen=True, eq=False)
class Clients:
    """A cohort and how it was found: `remarks` are for the person, `uniform` says that nobody
    told a sample count.
    """

    cohort: Cohort
    remarks: tuple[str, ...]
    uniform: bool


def read_clients(
    paths: Sequence[Path], samples: Path | None = None, base_model: str | None = None
) -> Clients:
    """The clients in `paths`: adapter folders, or folders whose children are adapter folders.

    Sample counts come from the file `samples` (a JSON object, or CSV `client,samples`), else from
    the client's folder (`COUNT_FILES`), else all clients count the same. Raises InputError.
    """
    folders, left_out = find_folders(paths)
    names = [_name(folder) for folder in folders]
    _check_distinct(folders)
    adapters = [formats.read(folder) for folder in folders]
    counts = _counts_from_file(samples, names) if samples else _counts_from_folders(folders, names)
    clients = [
        Client(name, adapter, counts[name] if counts else 1.0)
        for name, adapter in zip(names, adapters, strict=True)
    ]
    return Clients(align(clients, base_model), left_out, uniform=counts is None)


def _name(folder: Path) -> str:
    """The name of the folder, which reports and cards must be able to write down."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(folder, "a path that is not UTF-8", "rename the folder") from None
    # Without the links resolved, a client has the name that it was given.
    return Path(os.path.normpath(folder.absolute())).name


def _check_distinct(folders: Sequence[Path]) -> None:
    """One folder under two names, by a link for example, would vote twice."""
    first: dict[Path, Path] = {}
    for folder in folders:
        same = first.setdefault(folder.resolve(), folder)
        if same is not folder:
            raise InputError(folder, f"the same folder as {same}", "name every client once")


def find_folders(paths: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """The adapter folders in `paths`, and a remark about every child folder without an adapter.

    Hidden folders are not looked at: unfinished output has a hidden name. Raises InputError.
    """
    folders: list[Path] = []
    remarks: list[str] = []
    for path in paths:
        if formats.is_adapter(path):
            folders.append(path)
            continue
        children = _children(path)
        adapters = {child: None for child in children if formats.is_adapter(child)}
        if not adapters:
            deeper = next((c for c in children if any(map(formats.is_adapter, c.glob("*")))), None)
            guess = f"did you mean {deeper}? " if deeper else ""
            cure = "name adapter folders, or a folder whose children are adapter folders"
            raise InputError(path, "no adapters in it", guess + cure)
        folders += adapters
        for child in children:
            if child in adapters:
                continue
            if any(exists(child / file) for file, _ in COUNT_FILES):
                found = "a client's sample count, but no adapter"
                raise InputError(child, found, "wait until it is uploaded, or move it away")
            remarks.append(f"{child.name} left out: no adapter in it")
    return folders, tuple(sorted(remarks))


def _children(path: Path) -> list[Path]:
    """The visible folders in a folder. A link to nothing is a client that cannot be read."""
    try:
        visible = sorted(child for child in path.iterdir() if not child.name.startswith("."))
        for child in visible:
            if child.is_symlink() and not child.exists():
                raise InputError(child, "a link to nothing", "mend the link or remove it")
        return [child for child in visible if child.is_dir()]
    except OSError as error:
        raise unreadable(path, error) from None


def _counts_from_file(path: Path, names: Sequence[str]) -> dict[str, float]:
    """The sample count of every client, from one file that knows exactly these clients."""
    text = read_bytes(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] == b"{"
    raw = parse_object(text, where=path) if is_json else _parse_csv(text, path)
    counts = {name: _count(value, path, name) for name, value in raw.items()}
    unknown = sorted(set(counts) - set(names))
    if unknown:
        raise InputError(path, f"a count for {unknown[0]}, which is no client", "correct the name")
    missing = sorted(set(names) - set(counts))
    if missing:
        raise InputError(path, f"no count for {missing[0]}", "add it, or leave the client out")
    return counts


def _parse_csv(text: bytes, path: Path) -> dict[str, Any]:
    """Lines `client,samples`; a first line with these words is a header."""
    try:
        rows = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"not CSV ({error})", "write lines `client,samples`") from None
    result: dict[str, Any] = {}
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells == ["client", "samples"]):
            continue
        if len(cells) != 2:
            found = f"line {number} has {len(cells)} columns"
            raise InputError(path, found, "write lines `client,samples`")
        if cells[0] in result:
            raise InputError(path, f"line {number} names {cells[0]} again", "count a client once")
        try:
            result[cells[0]] = float(cells[1])
        except ValueError:
            found = f"line {number} says {cells[1]!r} samples"
            raise InputError(path, found, "write a number") from None
    return result


def _counts_from_folders(folders: Sequence[Path], names: Sequence[str]) -> dict[str, float] | None:
    """The sample count that every client's folder tells; None if not one does."""
    told = [_told(folder) for folder in folders]
    if all(count is None for count in told):
        return None
    counts = {}
    for folder, name, count in zip(folders, names, told, strict=True):
        if count is None:
            found = f"no sample count for {name}, while other clients have one"
            raise InputError(folder, found, 'write {"samples": n} to its fedlora.json')
        counts[name] = count
    return counts


def _told(folder: Path) -> float | None:
    for file, field in COUNT_FILES:
        path = folder / file
        if not exists(path):
            continue
        document = read_object(path, finite=False)
        if str(document.get("schema", "")).startswith("fedlora.aggregate/"):
            found = "a global adapter that fedlora wrote, not a client"
            raise InputError(folder, found, "give it as --previous, or count it with --samples")
        if document.get(field) is not None:
            return _count(document[field], path, field)
    return None


def _count(value: Any, path: Path, name: str) -> float:
    """A number of samples that there can be; with 0, a client has no vote by samples."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_SAMPLES:
        found = f"{name}: {repr(value)[:80]} samples"
        raise InputError(path, found, f"a sample count is a number from 0 to {MOST_SAMPLES:g}")
    return float(value)
