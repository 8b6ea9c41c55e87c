"""What is in adapters, how they differ, and every fault that would stop an aggregation of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.analysis.inspection.contents import contents, text
from fedlora_cli.analysis.inspection.differences import differences
from fedlora_cli.analysis.inspection.options import InspectOptions
from fedlora_cli.analysis.inspection.origin import is_reported, origin
from fedlora_cli.clients.discovery import find_folders
from fedlora_cli.clients.duplicates import check_copies, digests_of
from fedlora_cli.clients.reading import Paths, paths_of, read_clients
from fedlora_cli.clients.sample_counts import MAX_RATIO, sample_count_in
from fedlora_cli.errors import FaultHandler, InputError, catching_faults
from fedlora_cli.execution import engine
from fedlora_cli.remote import Location, prefetched
from fedlora_cli.reports.inspect import Fault, InspectReport, Origin
from fedlora_cli.reports.provenance import check_manifest, read_provenance
from fedlora_cli.text import printable
from fedlora_cli.version import __version__

DEFAULTS = InspectOptions()


def inspect(
    paths: Paths, options: InspectOptions = DEFAULTS, stage: engine.Stage = engine.quiet
) -> InspectReport:
    """The contents of the adapters in `paths`: adapter folders, or folders of adapter folders.

    The adapters are checked as the clients of one aggregation with the same `samples`, `base` and
    `adapter`. Global adapters that fedlora wrote are listed apart, unless `samples` counts them.
    Headers are read; with `values`, every tensor too. Bad input raises nothing: each fault is in
    the report.
    """
    samples, base, adapter = options.samples, options.base, options.adapter
    faults: dict[Fault, None] = {}  # in the order in which they were found

    def on_fault(error: InputError) -> None:
        faults.setdefault(Fault(error.where, error.here, error.cure))

    places = paths_of(paths)
    homes, remarks = find_folders(places, on_fault, adapter)
    home = {formats.inside(one, adapter): one for one in homes}
    folders = list(home)
    answers = prefetched(origin, folders)
    origins = {folder: answer() for folder, answer in zip(folders, answers, strict=True)}
    apart = _apart(folders, origins, samples)
    clients = sorted(set(folders) - set(apart), key=lambda one: one.parts)
    found: list[_Found] = []
    if clients:
        given = [home[folder] for folder in clients] if apart else places
        found += _clients(given, samples, base, adapter, on_fault)
    voting = len(found)
    for folder in apart:
        with catching_faults(on_fault):
            if clients:
                sample_count_in(folder)  # refuses a global adapter, as aggregate does
            read_provenance(folder)
            check_manifest(folder)
        with catching_faults(on_fault):
            # Global adapters of several rounds may well have one name.
            name = folder.resolve().name if len(apart) == 1 else str(folder)
            found.append(_Found(text(name), formats.read(folder, on_fault), None))
    zeros = (
        _values(found, clients, options.jobs, stage("reading values"), on_fault)
        if options.values
        else {}
    )
    return InspectReport(
        adapters=tuple(
            contents(
                one.name,
                one.adapter,
                one.samples,
                origins[one.adapter.path],
                _untrained(zeros.get(one.adapter.path, 0)),
            )
            for one in found
        ),
        differences=differences([(one.name, one.adapter) for one in found if one.adapter.modules]),
        faults=tuple(faults),
        notes=(*map(printable, remarks), *_remarks(found[:voting], origins)),
        values=options.values,
        version=__version__,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """An adapter under its name, and the sample count that was told."""

    name: str
    adapter: Adapter
    samples: float | None


def _apart(
    folders: list[Location], origins: Mapping[Location, Origin | None], samples: Location | None
) -> list[Location]:
    """The folders that are no clients: all, where fedlora wrote all of them, else those that
    aggregate would tell from clients. With a file of counts, it takes any adapter for one.
    """
    if samples is not None:
        return []
    reported = [folder for folder in folders if is_reported(folder)]
    written = [folder for folder in folders if origins[folder] or folder in reported]
    return folders if len(written) == len(folders) else reported


def _clients(
    paths: Sequence[Location],
    samples: Location | None,
    base: str | None,
    adapter: str | None,
    on_fault: FaultHandler,
) -> list[_Found]:
    """The clients that aggregate would find there, with their faults."""
    read = read_clients(paths, samples, base, on_fault, adapter=adapter, max_count_ratio=MAX_RATIO)
    # One wrong count makes all of them uniform; the others are known nevertheless.
    return [
        _Found(text(one.name), one.adapter, read.counts_by_path.get(one.adapter.path))
        for one in read.cohort.clients
    ]


def _values(
    found: Sequence[_Found],
    clients: Sequence[Location],
    jobs: int,
    progress: engine.Progress,
    on_fault: FaultHandler,
) -> Counter[Location]:
    """Reads all values, and counts the factors that are all zero, by adapter."""
    from fedlora_cli.clients.tensor_checks import check_base_weights, look_at

    looks = look_at([one.adapter for one in found], jobs, progress)
    for look in looks:
        for fault in look.faults:
            on_fault(fault)
    cohort = set(clients)
    check_base_weights((look for look in looks if look.item.adapter.path in cohort), on_fault)
    voting = [one.adapter for one in found if one.adapter.path in cohort]
    threads = jobs or engine.available_cores()
    # Whose file cannot be read is at fault already.
    digests = digests_of(voting, threads, engine.quiet(""), lambda fault: None)
    check_copies(voting, digests, on_fault)
    zeros: Counter[Location] = Counter()
    for look in looks:
        zeros[look.item.adapter.path] += look.zeros
    return zeros


def _untrained(zeros: int) -> list[str]:
    if not zeros:
        return []
    return [f"{zeros} of its factors are all zero: untrained, or padded"]


def _remarks(found: Sequence[_Found], origins: Mapping[Location, Origin | None]) -> list[str]:
    """A remark for every global adapter that would count as a client."""
    return [
        f"{one.name} was written by fedlora; aggregate would count it as a client"
        for one in found
        if origins[one.adapter.path]
    ]
