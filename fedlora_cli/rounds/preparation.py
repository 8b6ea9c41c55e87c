"""What an aggregation will do, found out from headers alone: most mistakes end here, in no time.

Nothing here imports torch, which takes longer than all of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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
class Preparation:
    """Clients, choices and the last two global adapters, where there are any; where the result
    goes; and remarks about the rounds.
    """

    clients: LoadedCohort
    options: AggregateOptions
    previous: Adapter | None
    before_previous: Adapter | None
    output: Location
    about_rounds: tuple[str, ...]

    @cached_property
    def plan(self) -> Plan:
        """Raises UsageError and InputError."""
        _check_dora(self.clients.cohort, self.options)
        return make_plan(self.clients.cohort, self.options, self.previous, self.before_previous)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What reading the headers showed."""
        earlier = (self.previous, self.before_previous)
        given = [adapter for adapter in earlier if adapter is not None]
        return (
            *self.about_rounds,
            *self.clients.remarks,
            *(note for adapter in given for note in adapter.notes),
            *(_remark(adapter.path) for adapter in given if _tells_samples(adapter.path)),
            *forgotten(self.plan, self.output),
            *server_doubts(self.plan),
        )

    def without(self, faults: Sequence[InputError]) -> Preparation:
        """The same without the clients at fault. Raises InputError as `leave_out` does."""
        options = self.options
        left = leave_out(self.clients, faults, options.base, options.min_clients)
        return replace(self, clients=left)


def prepare(clients: Paths, output: Location | str, options: AggregateOptions) -> Preparation:
    """The aggregation of these clients, as `aggregate` takes them, into this folder.

    Raises UsageError, InputError and OutputError.
    """
    paths, output = paths_of(clients), location(output)
    options, first = with_history(options, output)
    for earlier in (options.previous, options.before_previous):
        if earlier is not None:
            check_manifest(earlier)
    task = Preparation(
        clients=_find(paths, options),
        options=options,
        previous=None if options.previous is None else formats.read(options.previous),
        before_previous=(
            None if options.before_previous is None else formats.read(options.before_previous)
        ),
        output=output,
        about_rounds=first,
    )
    check_server(task.plan, task.plan.rank)
    _check_output(output, options, paths, task.plan)
    return task


def _find(paths: Sequence[Location], options: AggregateOptions) -> LoadedCohort:
    """All clients, or those that headers show no fault of. Raises InputError."""
    ratio, least = options.max_count_ratio, options.min_clients
    asked = (paths, options.samples, options.base)
    if options.on_bad_client == "refuse":
        found = read_clients(*asked, adapter=options.adapter, max_count_ratio=ratio)
        check_number(len(found.cohort.clients), (), least)
        return found
    found = select_clients(
        *asked, adapter=options.adapter, max_count_ratio=ratio, min_clients=least
    )
    faults: list[InputError] = []
    check_ranks(found.cohort, options.max_rank, faults.append)
    return leave_out(found, faults, options.base, least)


def _check_dora(cohort: Cohort, options: AggregateOptions) -> None:
    """DoRA's magnitudes multiply the base weights as well (arXiv:2402.09353): nothing exact can be
    done without them.
    """
    if cohort.facts.dora and options.dora == "refuse":
        found = "it uses DoRA, and the average of such adapters depends on the base model"
        cure = "train without use_dora, or give --dora approximate"
        raise InputError(cohort.clients[0].adapter.path, found, cure)


def _remark(earlier: Location) -> str:
    name = earlier.resolve().name
    return f"{name} is given as a global adapter, but tells a sample count like a client"


def _tells_samples(folder: Location) -> bool:
    try:
        return sample_count_in(folder) is not None
    except InputError:  # a global adapter's own report, or a damaged one
        return False


def _check_output(
    output: Location, options: AggregateOptions, clients: Sequence[Location], plan: Plan
) -> None:
    """The output may not stand inside anything that is read, nor hold it.

    It may be an earlier global adapter, renewed in place: that is read whole before it is replaced.
    """
    given = (options.previous, options.before_previous)
    earlier = [path for path in given if path is not None and path.resolve() != output.resolve()]
    read = [client.adapter.path for client in plan.cohort.clients]
    check_apart(output, [*clients, *read, *earlier])
    if options.dry_run:
        check_place(output)
    else:
        check_target(output, force=options.force, foreign=other_than(formats.FILES))
