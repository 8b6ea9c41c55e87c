"""From paths to a cohort: find the folders, name them, read the adapters, count, align."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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

#: The `clients` of the public functions: one folder, or several.
Paths = Location | str | Sequence[Location | str]

#: The source of the sample counts: a file, the clients' folders, or none (all count the same).
SamplesFrom = Literal["operator", "clients", "uniform"]

_UNIFORM = "no sample counts found: all clients count the same; give them with --samples FILE"


def paths_of(given: Paths) -> list[Location]:
    """The paths as a list. Raises UsageError.

    >>> paths_of("round-01") == paths_of([Path("round-01")])
    True
    """
    several = [given] if isinstance(given, (str, Path, Remote)) else given
    return [location(path) for path in several]


class Upload(NamedTuple):
    """A client's folder, with the client's name and adapter."""

    name: str
    folder: Location
    adapter: Adapter


@dataclass(frozen=True)
class LeftOut:
    """A client that does not take part, its path, and the reason."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class LoadedCohort:
    """A cohort with its sample counts and remarks about the reading.

    `counts_by_path` are the counts by the path of the adapter, also where a fault elsewhere makes
    all clients count the same.
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

    - `samples`: a file of sample counts, a JSON object or CSV `client,samples`. Without it, the
      counts come from the clients' folders (`COUNT_FILES`); without any, all count the same.
    - `adapter`: the subfolder of each client folder that holds the adapter.
    - `max_count_ratio`: a self-reported count above this many times the median is a fault; with
      None, it is only a remark.

    Every fault goes to `on_fault`. If it returns, the faulty clients are left out, and a faulty
    sample count makes all clients count the same. Raises InputError if no folder remains.
    """
    faults_of_folders: list[InputError] = []
    named, remarks = name_folders(paths, recording(on_fault, faults_of_folders), adapter)
    if not named:
        raise faults_of_folders[0]
    uploads = read_uploads(named, adapter, on_fault)
    faults: list[InputError] = []
    counts, count_remarks = sample_counts(
        uploads,
        samples,
        recording(on_fault, faults),
        others=None if faults_of_folders else (),
        adapter=adapter,
        max_count_ratio=max_count_ratio,
    )
    cohort = align(clients_of(uploads, {} if faults else counts), base_model, on_fault)
    remarks = (*count_remarks, *remarks)
    return loaded(cohort, counts, samples, adapter, remarks, usable=not faults)


def read_without_counts(
    paths: Sequence[Location], base_model: str | None, adapter: str | None
) -> tuple[Cohort, tuple[str, ...]]:
    """The clients in `paths`, all with one sample, and remarks. Raises InputError."""
    named, remarks = name_folders(paths, raise_fault, adapter)
    adapters = read_adapters([formats.inside(folder, adapter) for _, folder in named], raise_fault)
    clients = [Client(name, read, 1.0) for (name, _), read in zip(named, adapters, strict=True)]
    cohort = align(clients, base_model)
    return cohort, (*remarks, *(note for c in cohort.clients for note in c.adapter.notes))


def read_uploads(
    named: Sequence[tuple[str, Location]], adapter: str | None, on_fault: FaultHandler
) -> list[Upload]:
    """The clients' adapters; two names of one file are a fault."""
    adapters = read_adapters([formats.inside(folder, adapter) for _, folder in named], on_fault)
    _check_files(adapters, on_fault)
    return [Upload(*client, read) for client, read in zip(named, adapters, strict=True)]


def clients_of(uploads: Iterable[Upload], counts: Mapping[Location, float]) -> list[Client]:
    """The clients with their sample counts by folder; without a count, a client has one sample."""
    return [Client(name, adapter, counts.get(folder, 1.0)) for name, folder, adapter in uploads]


def loaded(
    cohort: Cohort,
    counts: Mapping[Location, float],
    samples: Location | None,
    adapter: str | None,
    remarks: tuple[str, ...],
    left_out: tuple[LeftOut, ...] = (),
    *,
    usable: bool = True,
) -> LoadedCohort:
    """The loaded cohort of clients with these sample counts by folder.

    Counts that are not `usable` are shown, but all clients count the same.
    """
    source: SamplesFrom = "clients" if samples is None else "operator"
    counted = usable and bool(counts)
    return LoadedCohort(
        cohort=cohort,
        counts_by_path={formats.inside(folder, adapter): n for folder, n in counts.items()},
        samples_from=source if counted else "uniform",
        remarks=remarks if counted else (_UNIFORM, *remarks),
        left_out=left_out,
    )


def sample_counts(
    uploads: Sequence[Upload],
    samples: Location | None,
    on_fault: FaultHandler,
    *,
    others: Collection[str] | None,
    adapter: str | None,
    max_count_ratio: float | None,
) -> tuple[dict[Location, float], tuple[str, ...]]:
    """The known sample counts by the client's folder, and remarks.

    `others` are names of further clients that the file may list; None allows any.
    """
    named = [(upload.name, upload.folder) for upload in uploads]
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
    return counts, tuple(f"{e.where}: {e.found}; aggregate refuses that" for e in beyond)


def _check_files(adapters: Iterable[Adapter], on_fault: FaultHandler) -> None:
    """Report every further name of a file to `on_fault`: a link would count a client twice."""
    first: dict[tuple[int, int], Path] = {}
    files = (adapter.weights_file for adapter in adapters)
    for file in sorted((f for f in files if isinstance(f, Path)), key=Path.is_symlink):
        try:
            status = file.stat()
        except OSError:  # reported when the adapter was read
            continue
        same = first.setdefault((status.st_dev, status.st_ino), file)
        if same is not file:
            found, cure = f"the same file as {same}", "count every upload once"
            on_fault(InputError(file, found, cure, {same.parent: None}))


def read_adapters(folders: Sequence[Location], on_fault: FaultHandler) -> list[Adapter]:
    """The adapters in these folders. Remote adapters are read in parallel."""

    def read(folder: Location) -> tuple[Adapter, list[InputError]]:
        """The adapter, empty if it cannot be read, and the faults of a remote adapter, which wait
        for their turn.
        """
        faults: list[InputError] = []
        adapter = Adapter(folder, folder, {}, {}, AdapterMetadata())
        handler = faults.append if isinstance(folder, Remote) else on_fault
        with catching_faults(handler):
            adapter = formats.read(folder, handler)
        return adapter, faults

    adapters = []
    for answer in prefetched(read, folders):
        adapter, faults = answer()
        for fault in faults:
            on_fault(fault)
        adapters.append(adapter)
    return adapters
