"""The plan of an aggregation, made from headers alone: most mistakes end here, within a second.

A request names the clients and the options, a loaded cohort holds the clients, a plan is ready to
run. No import here loads torch, which takes longer than the preparation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import Plan, check_ranks, make_plan
from fedlora_cli.aggregation.target import check_server, server_doubts
from fedlora_cli.clients.cohort import Cohort
from fedlora_cli.clients.reading import LoadedCohort, Paths, paths_of, read_clients
from fedlora_cli.clients.sample_counts import sample_count_in
from fedlora_cli.clients.skipping import check_number, leave_out, select_clients
from fedlora_cli.errors import InputError
from fedlora_cli.files.folder import check_apart, check_place, check_target, other_than
from fedlora_cli.files.locations import location
from fedlora_cli.remote import Location
from fedlora_cli.reports.provenance import check_manifest
from fedlora_cli.rounds.history import forgotten, with_history


@dataclass(frozen=True, eq=False)
class Request:
    """The paths, the options and the earlier global adapters; `remarks` are about the rounds."""

    paths: Sequence[Location]
    output: Location
    options: AggregateOptions
    previous: Adapter | None
    before_previous: Adapter | None
    remarks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Preparation:
    """An aggregation that is ready to run; `remarks` are what reading the headers showed."""

    request: Request
    clients: LoadedCohort
    plan: Plan
    remarks: tuple[str, ...]

    @property
    def options(self) -> AggregateOptions:
        return self.request.options

    @property
    def output(self) -> Location:
        return self.request.output


def prepare(clients: Paths, output: Location | str, options: AggregateOptions) -> Preparation:
    """The aggregation of these clients, as `aggregate` takes them, into this folder.

    Raises UsageError, InputError and OutputError.
    """
    request = _request(paths_of(clients), location(output), options)
    task = planned(request, _load(request))
    check_server(task.plan, task.plan.rank)
    _check_output(request, task.plan)
    return task


def planned(request: Request, clients: LoadedCohort) -> Preparation:
    """The request with its clients and their plan. Raises UsageError and InputError."""
    _check_dora(clients.cohort, request.options)
    plan = make_plan(clients.cohort, request.options, request.previous, request.before_previous)
    earlier = [one for one in (request.previous, request.before_previous) if one is not None]
    remarks = (
        *request.remarks,
        *clients.remarks,
        *(note for adapter in earlier for note in adapter.notes),
        *(_client_like(one.path) for one in earlier if _has_sample_count(one.path)),
        *forgotten(plan, request.output),
        *server_doubts(plan),
    )
    return Preparation(request, clients, plan, remarks)


def _request(paths: Sequence[Location], output: Location, options: AggregateOptions) -> Request:
    options, remarks = with_history(options, output)
    for earlier in (options.previous, options.before_previous):
        if earlier is not None:
            check_manifest(earlier)
    return Request(
        paths,
        output,
        options,
        previous=None if options.previous is None else formats.read(options.previous),
        before_previous=(
            None if options.before_previous is None else formats.read(options.before_previous)
        ),
        remarks=remarks,
    )


def _load(request: Request) -> LoadedCohort:
    """All clients; with "skip", those without a fault in their headers. Raises InputError."""
    options = request.options
    least, ratio = options.min_clients, options.max_count_ratio
    sources = (request.paths, options.samples, options.base)
    if options.on_bad_client == "refuse":
        loaded = read_clients(*sources, adapter=options.adapter, max_count_ratio=ratio)
        check_number(len(loaded.cohort.clients), (), least)
        return loaded
    loaded = select_clients(
        *sources, adapter=options.adapter, max_count_ratio=ratio, min_clients=least
    )
    faults: list[InputError] = []
    check_ranks(loaded.cohort, options.max_rank, faults.append)
    return leave_out(loaded, faults, options.base, least)


def _check_dora(cohort: Cohort, options: AggregateOptions) -> None:
    """Raise InputError for DoRA without `--dora approximate`.

    DoRA's magnitudes multiply the base weights as well (arXiv:2402.09353), so that an exact result
    needs the base model.
    """
    if cohort.metadata.dora and options.dora == "refuse":
        found = "it uses DoRA, and the average of such adapters depends on the base model"
        cure = "train without use_dora, or give --dora approximate"
        raise InputError(cohort.clients[0].adapter.path, found, cure)


def _client_like(earlier: Location) -> str:
    name = earlier.resolve().name
    return f"{name} is given as a global adapter, but has a sample count like a client"


def _has_sample_count(folder: Location) -> bool:
    try:
        return sample_count_in(folder) is not None
    except InputError:  # a global adapter's report, or a damaged file
        return False


def _check_output(request: Request, plan: Plan) -> None:
    """Raise OutputError if the output lies inside an input, or an input inside the output.

    The output may be an earlier global adapter, which is read completely before it is replaced.
    """
    options, output = request.options, request.output
    given = (options.previous, options.before_previous)
    earlier = [path for path in given if path is not None and path.resolve() != output.resolve()]
    read = [client.adapter.path for client in plan.cohort.clients]
    check_apart(output, [*request.paths, *read, *earlier])
    if options.dry_run:
        check_place(output)
    else:
        check_target(output, force=options.force, foreign=other_than(formats.FILES))
