"""The checks that read whole files: copies of another client, values that are not finite."""

from __future__ import annotations

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.clients.duplicates import check_copies, digests_of
from fedlora_cli.clients.reading import LoadedCohort
from fedlora_cli.clients.skipping import check_majority, leave_out
from fedlora_cli.clients.tensor_checks import check_base_weights, look_at
from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.execution import engine
from fedlora_cli.remote import Location


def drop_invalid_clients(
    clients: LoadedCohort, options: AggregateOptions, jobs: int, stage: engine.Stage
) -> tuple[LoadedCohort, dict[str, str]]:
    """The clients without a fault, and the SHA-256 of each weights file by the client's name.

    A value that is not finite ends an aggregation when its module is computed. To leave out the
    client instead, "skip" reads every tensor once beforehand. Raises InputError.
    """
    faults: list[InputError] = []
    on_fault: FaultHandler = raise_fault
    samples: dict[Location, float] | None = None
    if options.on_bad_client == "skip":
        clients = _with_finite_values(clients, options, jobs, stage("reading values"))
        on_fault = faults.append
        samples = {client.adapter.path: client.samples for client in clients.cohort.clients}
    adapters = _adapters(clients)
    digests = digests_of(adapters, jobs, stage("reading clients"), on_fault)
    if not options.allow_copies:
        check_copies(adapters, digests, on_fault, samples)
    clients = _without(clients, faults, options)
    return clients, {one.name: digests[one.adapter.path] for one in clients.cohort.clients}


def _with_finite_values(
    clients: LoadedCohort, options: AggregateOptions, jobs: int, progress: engine.Progress
) -> LoadedCohort:
    """The clients whose values are all finite and whose base weights agree."""
    looks = look_at(_adapters(clients), jobs, progress)
    clients = _without(clients, [fault for look in looks for fault in look.faults], options)
    paths = {adapter.path for adapter in _adapters(clients)}
    faults: list[InputError] = []
    check_base_weights((look for look in looks if look.item.adapter.path in paths), faults.append)
    remaining = _without(clients, faults, options)
    if faults:
        check_majority(len(_adapters(remaining)), len(paths), faults)
    return remaining


def _without(
    clients: LoadedCohort, faults: list[InputError], options: AggregateOptions
) -> LoadedCohort:
    return leave_out(clients, faults, options.base, options.min_clients)


def _adapters(clients: LoadedCohort) -> list[Adapter]:
    return [client.adapter for client in clients.cohort.clients]
