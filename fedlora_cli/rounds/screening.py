"""What reading files whole shows of the clients: who is a copy, and whose values are at fault."""

from __future__ import annotations

from fedlora_cli import engine
from fedlora_cli.analysis.inspection.values import check_base_weights, look_at
from fedlora_cli.copies import check_copies, digests_of
from fedlora_cli.errors import InputError, Report, refuse
from fedlora_cli.rounds.preparation import Preparation


def screened(
    task: Preparation, jobs: int, stage: engine.Stage
) -> tuple[Preparation, dict[str, str]]:
    """The task with the clients that remain, and the SHA-256 of each one's weights file, by name.

    Values that are not finite end an aggregation when they are met; to leave out the clients that
    have them, every tensor is read once beforehand. Raises InputError.
    """
    faults: list[InputError] = []
    report: Report = refuse
    if task.options.on_bad_client == "skip":
        report = faults.append
        adapters = [client.adapter for client in task.clients.cohort.clients]
        looks = look_at(adapters, jobs, stage("reading values"))
        for look in looks:
            faults += look.faults
        check_base_weights(looks, report)
        task = task.without(faults)
        faults.clear()
    clients = task.clients.cohort.clients
    adapters = [client.adapter for client in clients]
    digests = digests_of(adapters, jobs, stage("reading clients"), report)
    if not task.options.allow_copies:
        check_copies(adapters, digests, report)
    task = task.without(faults)
    left = task.clients.cohort.clients
    return task, {client.name: digests[client.adapter.path] for client in left}
