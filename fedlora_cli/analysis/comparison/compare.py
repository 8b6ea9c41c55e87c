"""All methods on the same clients: what each would write, without writing it."""

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
from fedlora_cli.linalg.spectrum import (
    effective_rank,
    energy,
    energy_ratio,
    pooled_energy,
    stable_rank,
)
from fedlora_cli.methods import METHODS
from fedlora_cli.reports.compare import CompareReport, MethodRow
from fedlora_cli.version import __version__

DEFAULTS = AggregateOptions()


def compare(
    clients: Paths,
    options: AggregateOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> CompareReport:
    """Every method on the clients in `clients`, with the choices of an aggregation.

    Of these, `method` is not looked at, and a `quorum` adds a row of raFLoRA with it. A method that
    these clients rule out is a row that says why. Raises UsageError and InputError.
    """
    paths = paths_of(clients)
    found = read_clients(paths, options.samples, options.base, adapter=options.adapter)
    previous = None if options.previous is None else formats.read(options.previous)
    # What ails the clients themselves is an error; what ails one method with them is a row.
    reading = make_plan(found.cohort, replace(options, method="raflora"), previous)
    contenders = _contenders(found, options, previous)
    jobs = options.jobs or engine.available_cores()
    torch.linalg.svd(torch.eye(2))  # the first call loads LAPACK, which is no method's time

    def one_part(names: tuple[str, ...]) -> list[ModuleOutcome]:
        return compare_part(contenders, reading, names)

    work = grouped(reading.adapters, reading.modules)
    progress = stage("comparing methods")
    outcomes = [one for part in engine.run(one_part, work, jobs, progress) for one in part]
    return _report(contenders, reading, outcomes, found)


def _contenders(
    found: LoadedCohort, options: AggregateOptions, previous: Adapter | None
) -> list[Contender]:
    plain = [(name, replace(options, method=name, quorum=None)) for name in METHODS]
    if options.quorum is not None:
        plain.insert(1, (f"raflora, q = {options.quorum:g}", replace(options, method="raflora")))
    return [_contender(name, found, choice, previous) for name, choice in plain]


def _contender(
    name: str, found: LoadedCohort, choice: AggregateOptions, previous: Adapter | None
) -> Contender:
    try:
        return Contender(name, make_plan(found.cohort, choice, previous))
    except FedloraError as error:
        return Contender(name, None, f"{error.where} {error.found}")


def _report(
    contenders: Sequence[Contender],
    reading: Plan,
    outcomes: Sequence[ModuleOutcome],
    found: LoadedCohort,
) -> CompareReport:
    cohort = found.cohort
    mean_norm = float(np.sqrt(sum(one.size for one in outcomes)))
    gaps = np.sqrt(np.sum([one.gaps for one in outcomes], axis=0))
    distances = gaps / mean_norm if mean_norm > 0 else np.full(gaps.shape, np.nan)
    methods = tuple(
        _row(one, cohort.shared_rank, m, outcomes, distances[m, -1])
        for m, one in enumerate(contenders)
    )
    without = reading.previous is None
    alone = ["without --previous, residual is flexlora"] if without else []
    return CompareReport(
        shared_rank=cohort.shared_rank,
        ranks=tuple(client.adapter.rank for client in cohort.clients),
        samples=tuple(client.samples for client in cohort.clients),
        modules=len(reading.modules),
        mean_norm=mean_norm,
        methods=methods,
        distances=tuple(tuple(_finite(v) for v in line[:-1]) for line in distances[:-1]),
        shared_seconds=sum(one.shared_seconds for one in outcomes),
        warnings=(*found.remarks, *cohort.notes, *alone),
        version=__version__,
    )


def _row(
    contender: Contender,
    shared_rank: int,
    m: int,
    outcomes: Sequence[ModuleOutcome],
    distance: float,
) -> MethodRow:
    plan = contender.plan
    refused = next((one.refused[m] for one in outcomes if one.refused[m]), contender.refused)
    if plan is None or refused is not None:
        return MethodRow(
            contender.name, None, None, None, None, None, None, None, (), None, refused
        )
    whole = [one.s[m] for one in outcomes]
    spectra = [s for s in whole if s is not None]
    written = [s[: plan.rank] for s in spectra]
    by_index = pooled_energy(written)
    total = sum(energy(s) for s in spectra)
    kept = float(by_index.sum())
    return MethodRow(
        name=contender.name,
        rank=plan.rank,
        energy_ratio=_finite(energy_ratio(written, shared_rank)),
        effective_rank=effective_rank(np.sqrt(by_index)),
        stable_rank=stable_rank(np.sqrt(by_index)),
        norm=float(np.sqrt(kept)),
        kept_energy=kept / total if total > 0 else None,
        distance=_finite(distance),
        energy=tuple(float(value) for value in by_index),
        seconds=float(sum(one.seconds[m] for one in outcomes)),
        refused=None,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
