"""Aggregation: client adapters in, one global adapter out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from fedlora_cli import formats
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.bounds import bounded, is_bounded
from fedlora_cli.aggregation.module import ranks_for_energy
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import Plan, PlanParts
from fedlora_cli.aggregation.target import check_server
from fedlora_cli.clients.reading import Paths
from fedlora_cli.errors import UsageError
from fedlora_cli.execution import engine
from fedlora_cli.execution.workers import Workers
from fedlora_cli.files.digests import sha256_of_all
from fedlora_cli.files.folder import check_space, claimed, new_folder, other_than
from fedlora_cli.files.locations import location
from fedlora_cli.files.writing import write_text
from fedlora_cli.remote import Location, Remote
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.reports.document import to_json
from fedlora_cli.reports.model_card import model_card
from fedlora_cli.reports.provenance import write_report
from fedlora_cli.rounds.output import check_readable, write_adapter, written_bytes
from fedlora_cli.rounds.preparation import Preparation, planned, prepare
from fedlora_cli.rounds.screening import drop_invalid_clients
from fedlora_cli.rounds.summary import summarize
from fedlora_cli.rounds.verify import verify
from fedlora_cli.rounds.work import estimate_work
from fedlora_cli.text import first_line

#: The defaults of the command.
DEFAULTS = AggregateOptions()


def aggregate(
    clients: Paths,
    output: Location | str,
    options: AggregateOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> AggregateReport:
    """Aggregate the adapters in `clients` into a PEFT adapter in the folder `output`.

    `clients` are adapter folders, or folders whose children are adapter folders. Raises UsageError,
    InputError, OutputError and VerificationError; no file is written then.
    """
    return execute(prepare(clients, output, options), stage)


def execute(task: Preparation, stage: engine.Stage = engine.quiet) -> AggregateReport:
    """Compute and write a prepared aggregation. Raises as `aggregate` does."""
    options, output = task.options, task.output
    jobs = options.jobs or engine.available_cores()
    check_readable(task.plan, _remarks(task))
    if options.dry_run:
        report = summarize(
            task.plan, [], task.plan.rank, {}, task.clients, task.remarks, str(output)
        )
        return _explained(task.plan, jobs, report)
    with claimed(output, force=options.force, foreign=_foreign):
        check_space(output, written_bytes(task.plan))
        device = _device(options.device)
        with new_folder(output, force=options.force, foreign=_foreign) as folder:
            # All workers end before the folder gets its final name.
            with engine.executor(options.cluster, jobs) as workers:
                clients, digests = drop_invalid_clients(task.clients, options, jobs, stage)
                if clients is not task.clients:
                    task = planned(task.request, clients)
                plan = replace(task.plan, options=replace(options, device=device))
                plan = _with_rank_and_bounds(plan, workers, stage)
                check_server(plan, plan.rank)
                if task.plan.rank is None:  # --energy has chosen the rank only now
                    check_space(output, written_bytes(plan))
                    check_readable(plan, _remarks(task))
                progress = stage("aggregating modules")
                outcomes = write_adapter(folder, plan, digests, workers, progress)
            report = summarize(
                plan, outcomes, plan.rank, digests, task.clients, task.remarks, str(output)
            )
            write_text(folder / "README.md", model_card(report))
            if options.verify:
                checked = verify(plan, folder, jobs, stage("verifying"))
                report = replace(report, verification=checked)
            report = replace(report, files=sha256_of_all(folder))
            document = to_json(_with_relative_paths(output, report).to_dict())
            write_report(folder, document)
        return _explained(plan, jobs, report) if options.explain else report


def _explained(plan: Plan, jobs: int, report: AggregateReport) -> AggregateReport:
    """The report with the estimate of the work; with the routes for `--explain`."""
    work = estimate_work(plan, jobs)
    return replace(report, work=work if plan.options.explain else replace(work, routes=()))


def _remarks(task: Preparation) -> tuple[str, ...]:
    return (*task.remarks, *(client.reason for client in task.clients.left_out))


_foreign = other_than(formats.FILES)


def _with_rank_and_bounds(plan: Plan, workers: Workers, stage: engine.Stage) -> Plan:
    """The plan with the norms, clips and trust of the clients and with its rank.

    Raises InputError.
    """
    if is_bounded(plan):
        plan = bounded(plan, workers, stage("comparing clients"))
    if plan.rank is None:
        plan = _with_rank(plan, workers, stage("choosing the rank"))
    return plan


def _with_rank(plan: Plan, workers: Workers, progress: engine.Progress) -> Plan:
    """The plan at the smallest rank that keeps `--energy` in every module; 1 without any energy.

    This reads all modules once, so that no module has to stay in memory until the rank is known.
    """
    groups = grouped(plan.adapters, plan.modules)
    results = engine.run(ranks_for_energy, PlanParts(plan, groups), workers, progress)
    return replace(plan, rank=max([1, *(rank for ranks in results for rank in ranks)]))


def _with_relative_paths(output: Location, report: AggregateReport) -> AggregateReport:
    """The report with paths relative to the output folder, so that its bytes depend neither on the
    parent of the folders nor on the spelling of the paths.
    """
    rows = [replace(row, path=_relative(location(row.path), output)) for row in report.clients]
    left_out = [
        replace(client, path=_relative(location(client.path), output, follow=False))
        for client in report.left_out
    ]
    return replace(report, output=".", clients=tuple(rows), left_out=tuple(left_out))


def _relative(path: Location, home: Location, *, follow: bool = True) -> str:
    """The path relative to `home`, with links followed or not.

    URLs stay absolute. For a remote output, local paths shrink to their names, so that no local
    path leaks.
    """
    if isinstance(path, Remote):
        return str(path)
    if isinstance(home, Remote):
        return path.name
    absolute = path.resolve() if follow else path.parent.resolve() / path.name
    return Path(os.path.relpath(absolute, home.resolve())).as_posix()


def _device(name: str) -> str:
    """The name of a device that computes in float64; "auto" is a GPU if there is one.

    Raises UsageError.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, dtype=torch.float64, device=name).sum().item()
    except (RuntimeError, TypeError, AssertionError, ImportError, ValueError) as error:
        # For other devices, torch describes its own build.
        reason = f" ({first_line(error).partition('. ')[0]})" if name.startswith("cuda") else ""
        found = f"{name} cannot be used{reason}"
        raise UsageError("--device", found, "give cpu, cuda, cuda:N or auto") from None
    return name
