"""From what the person named on the command line to a cohort: adapters, names, sample counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata
from fedlora_cli.clients.cohort import Client, Cohort, align
from fedlora_cli.clients.names import name_folders
from fedlora_cli.clients.sample_counts import (
    MAX_RATIO,
    check_ratio,
    counts_from_file,
    counts_from_folders,
)
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, raise_fault, recording
from fedlora_cli.files.locations import location
from fedlora_cli.remote import Location, Remote, prefetched

#: What the public functions take for their clients: one folder, or several.
Paths = Location | str | Sequence[Location | str]

#: Who vouches for the sample counts: a file, the clients' own folders, or nobody, and all count the
#: same.
SamplesFrom = Literal["operator", "clients", "uniform"]


def paths_of(given: Paths) -> list[Location]:
    """The folders given, one alone among them. Raises UsageError.

    >>> paths_of("round-01") == paths_of([Path("round-01")])
    True
    """
    several = [given] if isinstance(given, (str, Path, Remote)) else given
    return [location(one) for one in several]


_UNIFORM = "no sample counts found, all clients count the same; --samples FILE gives them"


@dataclass(frozen=True)
class LeftOut:
    """A client that does not take part, where it was looked for, and why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class LoadedCohort:
    """A cohort and how it was found. `told` are the sample counts that were found, by the path of
    the adapter, some maybe where others are at fault; `remarks` are for the person, and speak of
    counts that nobody told.
    """

    cohort: Cohort
    counts_by_path: Mapping[Location, float]
    samples_from: SamplesFrom
    remarks: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()


def read_clients(
    paths: Sequence[Location],
    samples: Location | None = None,
    base_model: str | None = None,
    on_fault: FaultHandler = raise_fault,
    *,
    adapter: str | None = None,
    max_count_ratio: float | None = None,
) -> LoadedCohort:
    """The clients in `paths`: adapter folders, or folders whose children are adapter folders.

    With `adapter`, every client's adapter is in the folder of that name in its folder. Sample
    counts come from the file `samples` (a JSON object, or CSV `client,samples`), else from the
    client's folder (`COUNT_FILES`), else all clients count the same. A count that a client tells
    is at fault beyond `max_count_ratio` times their median; None only remarks on it.

    Every fault goes to `on_fault`. If it returns, the faulty clients are left out, and all clients
    count the same where a count is at fault. Raises InputError where no folder is left.
    """
    refused: list[InputError] = []
    named, left_out = name_folders(paths, recording(on_fault, refused), adapter)
    if not named:
        raise refused[0]
    adapters = read_adapters([formats.inside(folder, adapter) for _, folder in named], on_fault)
    check_files(adapters, on_fault)
    faults: list[InputError] = []
    told, remarks = sample_counts(
        named,
        samples,
        recording(on_fault, faults),
        others=None if refused else (),
        adapter=adapter,
        max_count_ratio=max_count_ratio,
    )
    counts = {} if faults else told
    clients = [
        Client(name, one, counts.get(folder, 1.0))
        for (name, folder), one in zip(named, adapters, strict=True)
    ]
    return LoadedCohort(
        cohort=align(clients, base_model, on_fault),
        counts_by_path={formats.inside(folder, adapter): count for folder, count in told.items()},
        samples_from=vouching(samples, counts),
        remarks=(*uniform(counts), *remarks, *left_out),
    )


def sample_counts(
    named: Sequence[tuple[str, Location]],
    samples: Location | None,
    on_fault: FaultHandler,
    *,
    others: Collection[str] | None,
    adapter: str | None,
    max_count_ratio: float | None,
) -> tuple[dict[Location, float], tuple[str, ...]]:
    """The sample counts of the clients in these folders by folder, as far as they are known, and
    remarks. `others` are names that the file may know besides, None for any.
    """
    if samples is not None:
        with catching_faults(on_fault):
            return counts_from_file(samples, named, others, on_fault), ()
        return {}, ()
    counts = counts_from_folders(named, adapter, on_fault)
    if max_count_ratio is not None:
        check_ratio(counts, max_count_ratio, on_fault)
        return counts, ()
    beyond: list[InputError] = []
    check_ratio(counts, MAX_RATIO, beyond.append)
    return counts, tuple(f"{one.where}: {one.found}; aggregate refuses that" for one in beyond)


def vouching(samples: Location | None, counts: Mapping[Location, float]) -> SamplesFrom:
    """Who vouches for these counts, which the file `samples` told if there is one."""
    if not counts:
        return "uniform"
    return "clients" if samples is None else "operator"


def uniform(counts: Mapping[Location, float]) -> tuple[str, ...]:
    """A remark where there are no counts."""
    return () if counts else (_UNIFORM,)


def check_files(adapters: Iterable[Adapter], on_fault: FaultHandler) -> None:
    """One file under two names, by a link, would vote twice."""
    first: dict[tuple[int, int], Path] = {}
    files = [one.weights_file for one in adapters if isinstance(one.weights_file, Path)]
    for file in sorted(files, key=Path.is_symlink):
        try:
            status = file.stat()
        except OSError:  # which was reported when it was read
            continue
        same = first.setdefault((status.st_dev, status.st_ino), file)
        if same is not file:
            found, cure = f"the same file as {same}", "count every upload once"
            on_fault(InputError(file, found, cure, {same.parent: None}))


def read_adapters(folders: Sequence[Location], on_fault: FaultHandler) -> list[Adapter]:
    """The adapters in these folders. Those in a store are read many at a time."""

    def read(folder: Location) -> tuple[Adapter, list[InputError]]:
        """A report is told in turn: what is read ahead keeps its faults until then."""
        faults: list[InputError] = []
        told = faults.append if isinstance(folder, Remote) else on_fault
        return read_adapter(folder, told), faults

    adapters = []
    for answer in prefetched(read, folders):
        adapter, faults = answer()
        for fault in faults:
            on_fault(fault)
        adapters.append(adapter)
    return adapters


def read_adapter(folder: Location, on_fault: FaultHandler) -> Adapter:
    """The adapter in the folder; with nothing in it where not even that can be looked at."""
    with catching_faults(on_fault):
        return formats.read(folder, on_fault)
    return Adapter(folder, folder, {}, {}, AdapterMetadata())
