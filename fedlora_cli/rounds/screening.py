"""What reading files whole shows of the clients: who is a copy, and whose values are at fault."""

from __future__ import annotations

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.clients.duplicates import check_copies, digests_of
from fedlora_cli.clients.skipping import check_majority
from fedlora_cli.clients.tensor_checks import check_base_weights, look_at
from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.execution import engine
from fedlora_cli.remote import Location
from fedlora_cli.rounds.preparation import Preparation


def drop_invalid_clients(
    task: Preparation, jobs: int, stage: engine.Stage
) -> tuple[Preparation, dict[str, str]]:
    """The task with the clients that remain, and the SHA-256 of each one's weights file, by name.

    Values that are not finite end an aggregation when they are met; to leave out the clients that
    have them, every tensor is read once beforehand. Raises InputError.
    """
    faults: list[InputError] = []
    on_fault: FaultHandler = raise_fault
    samples: dict[Location, float] | None = None
    if task.options.on_bad_client == "skip":
        task = _with_whole_values(task, jobs, stage("reading values"))
        on_fault = faults.append
        samples = {one.adapter.path: one.samples for one in task.clients.cohort.clients}
    adapters = _adapters(task)
    digests = digests_of(adapters, jobs, stage("reading clients"), on_fault)
    if not task.options.allow_copies:
        check_copies(adapters, digests, on_fault, samples)
    task = task.without(faults)
    names = task.clients.cohort.names
    return task, {name: digests[one.path] for name, one in zip(names, _adapters(task), strict=True)}


def _with_whole_values(task: Preparation, jobs: int, progress: engine.Progress) -> Preparation:
    """The task with those clients whose values are all finite, and who have one base model."""
    looks = look_at(_adapters(task), jobs, progress)
    task = task.without([fault for look in looks for fault in look.faults])
    left = {adapter.path for adapter in _adapters(task)}
    misfits: list[InputError] = []
    check_base_weights((one for one in looks if one.item.adapter.path in left), misfits.append)
    rest = task.without(misfits)
    if misfits:
        check_majority(len(_adapters(rest)), len(left), misfits)
    return rest


def _adapters(task: Preparation) -> list[Adapter]:
    return [client.adapter for client in task.clients.cohort.clients]
