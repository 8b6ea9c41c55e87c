"""The clients' sample counts, from a file or from the clients' folders."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedlora_cli import formats
from fedlora_cli.errors import FaultHandler, InputError, catching_faults
from fedlora_cli.files import documents
from fedlora_cli.remote import Location, prefetched
from fedlora_cli.robust.median import lower_median

#: The files with a sample count in a client's folder and the field of each; the first file wins:
#: fedlora's, then those of the Hugging Face Trainer.
COUNT_FILES = (
    ("fedlora.json", "samples"),
    ("all_results.json", "train_samples"),
    ("train_results.json", "train_samples"),
)

_AGGREGATE = "fedlora.aggregate/"
_REPORT = re.compile(rb'\s*\{\s*"schema"\s*:\s*"fedlora\.aggregate/')

#: The largest sample count, beyond any client's; sums of larger counts would not be exact.
MOST_SAMPLES = 1e12

#: The largest self-reported sample count, in medians of all clients.
MAX_RATIO = 100.0


def counts_from_file(
    path: Location,
    clients: Sequence[tuple[str, Location]],
    others: Collection[str] | None,
    on_fault: FaultHandler,
) -> dict[Location, float]:
    """The sample counts by the clients' folders, from a file that lists exactly these clients.

    `others` are names of further clients that the file may list; None allows any. Raises InputError
    for a file that is no list of counts; other faults go to `on_fault`.
    """
    faults: list[InputError] = []
    text = documents.read_bytes(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] == b"{"
    raw = (
        documents.parse_object(text, where=path)
        if is_json
        else _parse_csv(text, path, faults.append)
    )
    counts: dict[str, float] = {}
    for name, value in raw.items():
        with catching_faults(faults.append):
            counts[name] = _count(value, path, name)
    names = {name for name, _ in clients}
    for name in [] if others is None else sorted(set(raw) - names - set(others)):
        found = f"a count for {name}, which is no client"
        faults.append(InputError(path, found, "correct the name"))
    for fault in faults:
        on_fault(fault)
    missing = [] if faults else [client for client in clients if client[0] not in raw]
    for name, folder in sorted(missing, key=lambda client: (client[0], client[1].parts)):
        found = f"no count for {name} in {path}"
        on_fault(InputError(folder, found, "add it, or leave the client out", {path: None}))
    return {folder: counts[name] for name, folder in clients if name in counts}


def _parse_csv(text: bytes, path: Location, on_fault: FaultHandler) -> dict[str, Any]:
    """The counts in lines `client,samples`; a first line with these words is a header."""
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
            on_fault(InputError(path, found, "write lines `client,samples`"))
        elif cells[0] in result:
            found = f"line {number} names {cells[0]} again"
            on_fault(InputError(path, found, "count a client once"))
        else:
            try:
                result[cells[0]] = float(cells[1])
            except ValueError:
                found = f"line {number} has {cells[1]!r} samples"
                on_fault(InputError(path, found, "write a number"))
    return result


def counts_from_folders(
    clients: Sequence[tuple[str, Location]], adapter: str | None, on_fault: FaultHandler
) -> dict[Location, float]:
    """The sample counts in the clients' folders; the folder of the `adapter` comes first.

    Either all clients have a count or none: a client that differs from the majority is a fault.
    """
    counts: dict[Location, float] = {}
    without: list[tuple[str, Location]] = []

    def read(folder: Location) -> float | None:
        places = dict.fromkeys((formats.inside(folder, adapter), folder))
        counts = (sample_count_in(place) for place in places)
        return next((count for count in counts if count is not None), None)

    answers = prefetched(read, [folder for _, folder in clients])
    for (name, folder), answer in zip(clients, answers, strict=True):
        with catching_faults(on_fault):
            count = answer()
            if count is None:
                without.append((name, folder))
            else:
                counts[folder] = count
    if len(counts) < len(without):
        for folder in counts:
            found = "a sample count, while most clients have none"
            on_fault(InputError(folder, found, "give every client a count, or give --samples"))
        without = []
    for name, folder in without if counts else []:
        found = f"no sample count for {name}, while other clients have one"
        for_files = "a client that is a file has no count: give all counts in --samples"
        cure = for_files if folder.is_file() else 'write {"samples": n} to its fedlora.json'
        on_fault(InputError(folder, found, cure))
    return counts


def check_ratio(counts: Mapping[Location, float], most: float, on_fault: FaultHandler) -> None:
    """Report each count above `most` times the lower median of the positive counts."""
    middle = lower_median(list(counts.values()))
    for folder, count in counts.items():
        if count > most * middle:
            found = f"{count:.12g} self-reported samples, more than {most:g} times the median of "
            found += f"the clients, {middle:.12g}"
            cure = "give --samples FILE, or a larger --max-count-ratio"
            on_fault(InputError(folder, found, cure))


def sample_count_in(folder: Location) -> float | None:
    """The sample count in a client's folder; None without any.

    Raises InputError, also for the folder of a global adapter.
    """
    for file, field in COUNT_FILES:
        path = folder / file
        if not documents.exists(path):
            continue
        try:
            document = documents.read_object(path, finite=False)
        except documents.TooLarge:
            # The report of a global adapter may be larger than any file of counts.
            if not _REPORT.match(documents.read_beginning(path, 200)):
                raise
            document = {"schema": _AGGREGATE}
        if str(document.get("schema", "")).startswith(_AGGREGATE):
            found = "a global adapter that fedlora wrote, not a client"
            raise InputError(folder, found, "leave it out; aggregate takes it as --previous")
        if document.get(field) is not None:
            return _count(document[field], path, field)
    return None


def _count(value: Any, path: Location, name: str) -> float:
    """A valid sample count; with 0, a client has no weight by samples."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_SAMPLES:
        found = f"{name}: {repr(value)[:80]} samples"
        raise InputError(path, found, f"a sample count is a number from 0 to {MOST_SAMPLES:g}")
    return float(value)
