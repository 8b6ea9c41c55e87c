"""How many samples every client trained on, as a file or their own folders tell."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora_cli.errors import InputError, Report, keeping, reporting
from fedlora_cli.files.documents import exists, parse_object, read_bytes, read_object

#: Where a client's own folder may tell its sample count, first found wins: fedlora's own file, then
#: those of the Hugging Face Trainer.
COUNT_FILES = (
    ("fedlora.json", "samples"),
    ("all_results.json", "train_samples"),
    ("train_results.json", "train_samples"),
)

#: More samples than any client has; beyond it, sums would no longer be exact.
MOST_SAMPLES = 1e12


def counts_from_file(
    path: Path, names: Sequence[str], refused: Sequence[InputError], report: Report
) -> dict[str, float] | None:
    """The sample count of every client, from one file that knows exactly these clients.

    None where it does not. A name that is no client may be one that was refused before.
    """
    faults: list[InputError] = []
    told = keeping(report, faults)
    text = read_bytes(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] == b"{"
    raw = parse_object(text, where=path) if is_json else _parse_csv(text, path, told)
    counts: dict[str, float] = {}
    for name, value in raw.items():
        with reporting(told):
            counts[name] = _count(value, path, name)
    for name in [] if refused else sorted(set(raw) - set(names)):
        told(InputError(path, f"a count for {name}, which is no client", "correct the name"))
    for name in [] if faults else sorted(set(names) - set(raw)):
        told(InputError(path, f"no count for {name}", "add it, or leave the client out"))
    return None if faults else counts


def _parse_csv(text: bytes, path: Path, report: Report) -> dict[str, Any]:
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
            report(InputError(path, found, "write lines `client,samples`"))
        elif cells[0] in result:
            found = f"line {number} names {cells[0]} again"
            report(InputError(path, found, "count a client once"))
        else:
            try:
                result[cells[0]] = float(cells[1])
            except ValueError:
                found = f"line {number} says {cells[1]!r} samples"
                report(InputError(path, found, "write a number"))
    return result


def counts_from_folders(
    folders: Sequence[Path], names: Sequence[str], report: Report
) -> dict[str, float] | None:
    """The sample count that every client's folder tells; None if not one does, or one is wrong."""
    faults: list[InputError] = []
    told = keeping(report, faults)
    counts: dict[str, float] = {}
    silent: list[tuple[Path, str]] = []
    for folder, name in zip(folders, names, strict=True):
        with reporting(told):
            count = told_samples(folder)
            if count is None:
                silent.append((folder, name))
            else:
                counts[name] = count
    for folder, name in silent if counts else []:
        found = f"no sample count for {name}, while other clients have one"
        told(InputError(folder, found, 'write {"samples": n} to its fedlora.json'))
    return None if faults or not counts else counts


def told_samples(folder: Path) -> float | None:
    """The sample count that a client's folder tells. Raises InputError, for the folder of a global
    adapter too.
    """
    for file, field in COUNT_FILES:
        path = folder / file
        if not exists(path):
            continue
        document = read_object(path, finite=False)
        if str(document.get("schema", "")).startswith("fedlora.aggregate/"):
            found = "a global adapter that fedlora wrote, not a client"
            raise InputError(folder, found, "leave it out; aggregate takes it as --previous")
        if document.get(field) is not None:
            return _count(document[field], path, field)
    return None


def _count(value: Any, path: Path, name: str) -> float:
    """A number of samples that there can be; with 0, a client has no vote by samples."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_SAMPLES:
        found = f"{name}: {repr(value)[:80]} samples"
        raise InputError(path, found, f"a sample count is a number from 0 to {MOST_SAMPLES:g}")
    return float(value)
