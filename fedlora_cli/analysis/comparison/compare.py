"""All methods on the same clients: the update of each, without writing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import Plan, make_plan
from fedlora_cli.analysis.comparison.module import Contender, ModuleOutcome, compare_part
from fedlora_cli.clients.reading import LoadedCohort, Paths, paths_of, read_clients
from fedlora_cli.errors import FedloraError
from fedlora_cli.execution import engine
from fedlora_cli.linalg import spectrum
from fedlora_cli.methods import distributions, listing
from fedlora_cli.reports.compare import CompareReport, MethodRow
from fedlora_cli.version import __version__

DEFAULTS = AggregateOptions()


def compare(
    clients: Paths,
    options: AggregateOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> CompareReport:
    """The report on every method with the adapters in `clients` and the options of an aggregation.

    `method` is ignored, and a `quorum` adds a row of raFLoRA with that quorum. A method that cannot
    run has a row with the reason. Raises UsageError and InputError.
    """
    paths = paths_of(clients)
    loaded = read_clients(paths, options.samples, options.base, adapter=options.adapter)
    previous = None if options.previous is None else formats.read(options.previous)
    # A fault of the clients is an error; a method that cannot run with them is a row.
    reading = make_plan(loaded.cohort, replace(options, method="raflora"), previous)
    contenders = _contenders(loaded, options, previous)
    torch.linalg.svd(torch.eye(2))  # the first call loads LAPACK, which must not be timed

    def one_part(names: tuple[str, ...]) -> list[ModuleOutcome]:
        return compare_part(contenders, reading, names)

    work = grouped(reading.adapters, reading.modules)
    progress = stage("comparing methods")
    outcomes = [
        module for part in engine.run(one_part, work, options.jobs, progress) for module in part
    ]
    return _report(contenders, reading, outcomes, loaded)


def _contenders(
    loaded: LoadedCohort, options: AggregateOptions, previous: Adapter | None
) -> list[Contender]:
    methods, broken = listing()
    choices = [(name, replace(options, method=name, quorum=None)) for name in methods]
    if options.quorum is not None:
        choices.insert(1, (f"raflora, q = {options.quorum:g}", replace(options, method="raflora")))

    def contender(name: str, choice: AggregateOptions) -> Contender:
        try:
            return Contender(name, make_plan(loaded.cohort, choice, previous))
        except FedloraError as error:
            return Contender(name, None, f"{error.where} {error.found}")

    unusable = [Contender(name, None, str(error)) for name, error in broken.items()]
    return [*(contender(*choice) for choice in choices), *unusable]


def _report(
    contenders: Sequence[Contender],
    reading: Plan,
    outcomes: Sequence[ModuleOutcome],
    loaded: LoadedCohort,
) -> CompareReport:
    cohort = loaded.cohort
    mean_norm = float(np.sqrt(sum(module.size for module in outcomes)))
    gaps = np.sqrt(np.sum([module.gaps for module in outcomes], axis=0))
    distances = gaps / mean_norm if mean_norm > 0 else np.full(gaps.shape, np.nan)
    alone = ["without --previous, residual equals flexlora"] if reading.previous is None else []
    return CompareReport(
        shared_rank=cohort.shared_rank,
        ranks=tuple(client.adapter.rank for client in cohort.clients),
        samples=tuple(client.samples for client in cohort.clients),
        modules=len(reading.modules),
        mean_norm=mean_norm,
        methods=tuple(
            _row(contender, cohort.shared_rank, m, outcomes, distances[m, -1])
            for m, contender in enumerate(contenders)
        ),
        distances=tuple(tuple(spectrum.finite(v) for v in line[:-1]) for line in distances[:-1]),
        shared_seconds=sum(module.shared_seconds for module in outcomes),
        warnings=(*loaded.remarks, *cohort.notes, *alone),
        version=__version__,
        distributions=distributions(one.plan.method for one in contenders if one.plan),
    )


def _row(
    contender: Contender,
    shared_rank: int,
    m: int,
    outcomes: Sequence[ModuleOutcome],
    distance: float,
) -> MethodRow:
    plan = contender.plan
    refused = next((o.refused[m] for o in outcomes if o.refused[m]), contender.refused)
    if plan is None or refused is not None:
        return MethodRow(
            contender.name, None, None, None, None, None, None, None, (), None, refused
        )
    spectra = [s for outcome in outcomes if (s := outcome.s[m]) is not None]
    written = [s[: plan.rank] for s in spectra]
    by_index = spectrum.pooled_energy(written)
    total = sum(outcome.energy[m] or 0.0 for outcome in outcomes)
    kept = float(by_index.sum())
    return MethodRow(
        name=contender.name,
        rank=plan.rank,
        energy_ratio=spectrum.finite(spectrum.energy_ratio(written, shared_rank)),
        effective_rank=spectrum.effective_rank(np.sqrt(by_index)),
        stable_rank=spectrum.stable_rank(np.sqrt(by_index)),
        norm=float(np.sqrt(kept)),
        kept_energy=kept / total if total > 0 else None,
        distance=spectrum.finite(distance),
        energy=tuple(float(value) for value in by_index),
        seconds=float(sum(outcome.seconds[m] for outcome in outcomes)),
        refused=None,
    )
