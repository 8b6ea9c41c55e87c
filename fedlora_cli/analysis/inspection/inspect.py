"""The contents and differences of adapters, and every fault that would stop their aggregation."""

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
    """The report on the adapters in `paths`: adapter folders, or folders of adapter folders.

    The adapters are checked as the clients of one aggregation with these `samples`, this `base` and
    this `adapter` subfolder. Global adapters that fedlora wrote are checked separately, unless
    `samples` is given. With `values`, every tensor is read, not just the headers. Bad input becomes
    a fault in the report.
    """
    faults: dict[Fault, None] = {}  # a set that keeps the order

    def on_fault(error: InputError) -> None:
        faults.setdefault(Fault(error.where, error.here, error.cure))

    places = paths_of(paths)
    homes, remarks = find_folders(places, on_fault, options.adapter)
    home = {formats.inside(path, options.adapter): path for path in homes}
    folders = list(home)
    answers = prefetched(origin, folders)
    origins = {folder: answer() for folder, answer in zip(folders, answers, strict=True)}
    globals_ = _globals(folders, origins, options.samples)
    clients = sorted(set(folders) - set(globals_), key=lambda folder: folder.parts)
    adapters: list[_Named] = []
    if clients:
        given = [home[folder] for folder in clients] if globals_ else places
        adapters += _clients(given, options, on_fault)
    written = [client.name for client in adapters if origins[client.adapter.path]]
    for folder in globals_:
        with catching_faults(on_fault):
            if clients:
                sample_count_in(folder)  # rejects a global adapter, as aggregate does
            read_provenance(folder)
            check_manifest(folder)
        with catching_faults(on_fault):
            # The global adapters of several rounds often have the same name.
            name = folder.resolve().name if len(globals_) == 1 else str(folder)
            adapters.append(_Named(text(name), formats.read(folder, on_fault), None))
    zeros: Mapping[Location, int] = {}
    if options.values:
        zeros = _values(adapters, clients, options.jobs, stage("reading values"), on_fault)
    return InspectReport(
        adapters=tuple(
            contents(
                named.name,
                named.adapter,
                named.samples,
                origins[named.adapter.path],
                zeros.get(named.adapter.path, 0),
            )
            for named in adapters
        ),
        differences=differences([(a.name, a.adapter) for a in adapters if a.adapter.modules]),
        faults=tuple(faults),
        notes=(
            *map(printable, remarks),
            *(f"fedlora wrote {name}; aggregate would count it as a client" for name in written),
        ),
        values=options.values,
        version=__version__,
    )


@dataclass(frozen=True, eq=False)
class _Named:
    """An adapter with its name and its sample count, None if the count is unknown."""

    name: str
    adapter: Adapter
    samples: float | None


def _globals(
    folders: list[Location], origins: Mapping[Location, Origin | None], samples: Location | None
) -> list[Location]:
    """The folders of global adapters: all folders if fedlora wrote all of them, else those with a
    report. With a file of sample counts, every adapter is a client, as in `aggregate`.
    """
    if samples is not None:
        return []
    reported = [folder for folder in folders if is_reported(folder)]
    written = [folder for folder in folders if origins[folder] or folder in reported]
    return folders if len(written) == len(folders) else reported


def _clients(
    paths: Sequence[Location], options: InspectOptions, on_fault: FaultHandler
) -> list[_Named]:
    """The clients that `aggregate` would read from `paths`."""
    samples, base, adapter = options.samples, options.base, options.adapter
    read = read_clients(paths, samples, base, on_fault, adapter=adapter, max_count_ratio=MAX_RATIO)
    # One wrong count makes the cohort's counts uniform; `counts_by_path` keeps the valid counts.
    counts = read.counts_by_path
    return [
        _Named(text(c.name), c.adapter, counts.get(c.adapter.path)) for c in read.cohort.clients
    ]


def _values(
    adapters: Sequence[_Named],
    clients: Sequence[Location],
    jobs: int,
    progress: engine.Progress,
    on_fault: FaultHandler,
) -> Counter[Location]:
    """The number of all-zero factors of each adapter. Reads every tensor and reports its faults."""
    from fedlora_cli.clients.tensor_checks import check_base_weights, look_at

    looks = look_at([named.adapter for named in adapters], jobs, progress)
    for look in looks:
        for fault in look.faults:
            on_fault(fault)
    cohort = set(clients)
    check_base_weights((look for look in looks if look.item.adapter.path in cohort), on_fault)
    voters = [named.adapter for named in adapters if named.adapter.path in cohort]
    # An unreadable file is a fault already.
    digests = digests_of(voters, jobs, engine.quiet(""), lambda fault: None)
    check_copies(voters, digests, on_fault)
    zeros: Counter[Location] = Counter()
    for look in looks:
        zeros[look.item.adapter.path] += look.zeros
    return zeros
