"""The main job: client adapters in, one global adapter out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora_cli import engine, formats
from fedlora_cli.adapter import Adapter
from fedlora_cli.aggregation.module import ModuleResult, aggregate_module
from fedlora_cli.aggregation.options import Options
from fedlora_cli.aggregation.plan import Plan, make_plan
from fedlora_cli.clients import Clients, Paths, paths_of, read_clients
from fedlora_cli.counts import told_samples
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.files.folder import check_apart, check_target, new_folder, other_than
from fedlora_cli.formats import peft
from fedlora_cli.render.card import model_card
from fedlora_cli.render.document import aggregate_document, to_json
from fedlora_cli.render.report.aggregate import AggregateReport
from fedlora_cli.rounds.history import forgotten, with_history
from fedlora_cli.rounds.summary import summarize
from fedlora_cli.rounds.tensors import average_tensor, modules_to_save, tensor_names
from fedlora_cli.rounds.verify import verify
from fedlora_cli.spectrum import rank_for_energy
from fedlora_cli.stored import at_rank
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
    paths, output = paths_of(clients), Path(output)
    options, first = with_history(options, output)
    found = read_clients(paths, options.samples, options.base)
    previous = None if options.previous is None else formats.read(options.previous)
    before = None if options.before_previous is None else formats.read(options.before_previous)
    plan = make_plan(found.cohort, options, previous, before)
    remarks = (*first, *_remarks(found, previous, before), *forgotten(plan, output))
    _check_output(output, options, paths, plan)
    if options.dry_run:
        return summarize(plan, [], plan.rank, {}, remarks, str(output))

    jobs = options.jobs or engine.available_cores()
    _check_device(options.device)
    digests = _digests(plan, jobs, stage("reading clients"))
    progress = stage("aggregating modules")
    tasks = engine.run(lambda name: aggregate_module(plan, name), plan.modules, jobs, progress)
    results = list(tasks)
    rank = plan.rank or _rank_for_energy(results, options.energy)
    report = summarize(plan, results, rank, digests, remarks, str(output))
    with new_folder(output, force=options.force, foreign=other_than(peft.FILES)) as folder:
        _write(folder, plan, results, rank, report)
        if options.verify:
            checked = verify(plan, folder, jobs, stage("verifying"))
            report = replace(report, verification=checked)
        document = to_json(aggregate_document(_seen_from(output, report)))
        (folder / "fedlora.json").write_text(document, encoding="utf-8")
    return report


def _seen_from(output: Path, report: AggregateReport) -> AggregateReport:
    """The report with paths relative to the output folder: its bytes depend neither on where the
    two stand together nor on how the paths were spelled.
    """
    home = output.resolve()
    rows = [
        replace(row, path=Path(os.path.relpath(Path(row.path).resolve(), home)).as_posix())
        for row in report.clients
    ]
    return replace(report, output=".", clients=tuple(rows))


def _write(
    folder: Path, plan: Plan, results: Sequence[ModuleResult], rank: int, report: AggregateReport
) -> None:
    adapter = peft.NewAdapter(
        factors={result.name: at_rank(result.factors, rank, result.name) for result in results},
        alphas=dict.fromkeys(plan.modules, plan.scale * rank),
        kinds={name: plan.kind(name) for name in plan.modules},
        tensors={name: average_tensor(plan, name) for name in tensor_names(plan)},
        modules_to_save=modules_to_save(plan),
        facts=plan.cohort.facts,
    )
    peft.write(adapter, folder, _provenance(report))
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


def _digests(plan: Plan, jobs: int, progress: engine.Progress) -> dict[str, str]:
    """SHA-256 of every client's weights file, as `sha256sum` prints it."""

    def digest(path: Path) -> str:
        total = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})", "check it") from None
        return total.hexdigest()

    files = [client.adapter.weights_file for client in plan.cohort.clients]
    return dict(zip(plan.cohort.names, engine.run(digest, files, jobs, progress), strict=True))


def _rank_for_energy(results: Sequence[ModuleResult], fraction: float | None) -> int:
    """The smallest rank that keeps the fraction in every module; 1 if there is no energy."""
    return max([1, *(rank_for_energy(result.s, fraction or 1.0) for result in results)])


def _remarks(found: Clients, *earlier: Adapter | None) -> tuple[str, ...]:
    """What reading the clients and the earlier global adapters showed."""
    given = [adapter for adapter in earlier if adapter is not None]
    return (
        *found.remarks,
        *(note for adapter in given for note in adapter.notes),
        *(
            f"{adapter.path} is given as a global adapter, but tells a sample count like a client"
            for adapter in given
            if _tells_samples(adapter.path)
        ),
    )


def _tells_samples(folder: Path) -> bool:
    try:
        return told_samples(folder) is not None
    except InputError:  # a global adapter's own report, or a damaged one
        return False


def _check_output(output: Path, options: Options, clients: Sequence[Path], plan: Plan) -> None:
    """The output may not stand inside anything that is read, nor hold it.

    It may be an earlier global adapter, renewed in place: that is read whole before it is replaced.
    """
    given = (options.previous, options.before_previous)
    earlier = [path for path in given if path is not None and path.resolve() != output.resolve()]
    read = [client.adapter.path for client in plan.cohort.clients]
    check_apart(output, [*clients, *read, *earlier])
    if not options.dry_run:
        check_target(output, force=options.force, foreign=other_than(peft.FILES))


def _check_device(name: str) -> None:
    """Whether that device is there and computes in float64. Raises UsageError."""
    try:
        torch.ones(1, dtype=torch.float64, device=name).sum().item()
    except (RuntimeError, TypeError, AssertionError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UsageError("--device", f"{name} cannot be used ({reason})", "try cpu") from None
