"""The main job: client adapters in, one global adapter out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora_cli import engine, formats
from fedlora_cli.adapter import NewAdapter
from fedlora_cli.aggregation.bounds import bounded, is_bounded
from fedlora_cli.aggregation.module import ModuleResult, aggregate_module
from fedlora_cli.aggregation.options import Options
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.target import check_server
from fedlora_cli.clients import Paths
from fedlora_cli.errors import UsageError, first_line
from fedlora_cli.files.digests import sha256_of_all
from fedlora_cli.files.folder import check_space, claimed, new_folder, other_than
from fedlora_cli.render.card import model_card
from fedlora_cli.render.document import aggregate_document, to_json
from fedlora_cli.render.report.aggregate import AggregateReport
from fedlora_cli.rounds.preparation import Preparation, prepare
from fedlora_cli.rounds.screening import screened
from fedlora_cli.rounds.summary import summarize
from fedlora_cli.rounds.tensors import average_tensor, modules_to_save, tensor_names
from fedlora_cli.rounds.verify import verify
from fedlora_cli.spectrum import rank_for_energy
from fedlora_cli.stored import at_rank, stored_bytes
from fedlora_cli.version import __version__

#: The choices of the command when no option is given.
DEFAULTS = Options()


def aggregate(
    clients: Paths,
    output: Path | str,
    options: Options = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> AggregateReport:
    """Aggregate the adapters in `clients` into a PEFT adapter in the folder `output`.

    `clients` are adapter folders, or folders whose children are adapter folders. The folder is
    there whole afterwards or not at all. Raises UsageError, InputError, OutputError and
    VerificationError; nothing is written then.
    """
    return carry_out(prepare(clients, output, options), stage)


def carry_out(task: Preparation, stage: engine.Stage = engine.quiet) -> AggregateReport:
    """What was prepared, computed and written. Raises as `aggregate` does."""
    options, output = task.options, task.output
    if options.dry_run:
        return summarize(task.plan, [], task.plan.rank, {}, task.clients, task.remarks, str(output))
    with claimed(output, force=options.force, foreign=other_than(formats.FILES)):
        check_space(output, _size(task.plan))
        jobs = options.jobs or engine.available_cores()
        _check_device(options.device)
        task, digests = screened(task, jobs, stage)
        plan = task.plan
        if is_bounded(plan):
            plan = bounded(plan, jobs, stage("comparing clients"))
        progress = stage("aggregating modules")
        tasks = engine.run(lambda name: aggregate_module(plan, name), plan.modules, jobs, progress)
        results = list(tasks)
        rank = plan.rank or _rank_for_energy(results, options.energy)
        check_server(plan, rank)
        remarks = task.remarks
        report = summarize(plan, results, rank, digests, task.clients, remarks, str(output))
        with new_folder(output, force=options.force, foreign=other_than(formats.FILES)) as folder:
            _write(folder, plan, results, rank, report)
            if options.verify:
                checked = verify(plan, folder, jobs, stage("verifying"))
                report = replace(report, verification=checked)
            report = replace(report, files=sha256_of_all(folder))
            document = to_json(aggregate_document(_seen_from(output, report)))
            (folder / "fedlora.json").write_text(document, encoding="utf-8")
        return report


def _seen_from(output: Path, report: AggregateReport) -> AggregateReport:
    """The report with paths relative to the output folder: its bytes depend neither on where the
    two stand together nor on how the paths were spelled.
    """
    home = output.resolve()
    rows = [replace(row, path=_relative(Path(row.path).resolve(), home)) for row in report.clients]
    left_out = [
        replace(one, path=_relative(Path(one.path).parent.resolve() / Path(one.path).name, home))
        for one in report.left_out
    ]
    return replace(report, output=".", clients=tuple(rows), left_out=tuple(left_out))


def _relative(path: Path, home: Path) -> str:
    return Path(os.path.relpath(path, home)).as_posix()


def _write(
    folder: Path, plan: Plan, results: Sequence[ModuleResult], rank: int, report: AggregateReport
) -> None:
    adapter = NewAdapter(
        factors={result.name: at_rank(result.factors, rank, result.name) for result in results},
        alphas=dict.fromkeys(plan.modules, plan.scale * rank),
        layouts={name: plan.layout(name) for name in plan.modules},
        tensors={name: average_tensor(plan, name) for name in tensor_names(plan)},
        modules_to_save=modules_to_save(plan),
        facts=plan.cohort.facts,
    )
    formats.FORMATS[plan.cohort.format].write(adapter, folder, _provenance(report))
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


def _provenance(report: AggregateReport) -> dict[str, Any]:
    """What the weights file itself remembers, when it travels alone."""
    return {
        "version": __version__,
        "method": report.method,
        "source": report.source,
        "options": {flag: str(value) for flag, value in report.options.items()},
        "shared_rank": report.shared_rank,
        "clients": [
            {"name": row.name, "rank": row.rank, "samples": row.samples, "sha256": row.sha256}
            for row in report.clients
        ],
    }


def _size(plan: Plan) -> int:
    """The bytes of all factors and full tensors; 0 while the rank is not known."""
    if plan.rank is None:
        return 0
    earlier = [] if plan.previous is None else [plan.previous]
    adapters = [*earlier, *(client.adapter for client in plan.cohort.clients)]
    full = {name: one for adapter in adapters for name, one in adapter.tensors.items()}
    sides = sum(sum(plan.shape(name)) for name in plan.modules)
    factors = stored_bytes((plan.rank, sides), plan.dtype)
    return factors + sum(stored_bytes(one.shape, one.dtype) for one in full.values())


def _rank_for_energy(results: Sequence[ModuleResult], fraction: float | None) -> int:
    """The smallest rank that keeps the fraction in every module; 1 if there is no energy."""
    return max([1, *(rank_for_energy(result.s, fraction or 1.0) for result in results)])


def _check_device(name: str) -> None:
    """Whether that device is there and computes in float64. Raises UsageError."""
    try:
        torch.ones(1, dtype=torch.float64, device=name).sum().item()
    except (RuntimeError, TypeError, AssertionError, ImportError, ValueError) as error:
        found = f"{name} cannot be used ({first_line(error)})"
        raise UsageError("--device", found, "try cpu") from None
