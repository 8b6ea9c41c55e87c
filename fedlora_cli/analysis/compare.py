"""All methods on the same clients: what each would write, without writing it.

Every method's update lies in the column space of the stacked B and the row space of the stacked A,
so after one QR of both, all of them are cores of S × S, and so are their differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from fedlora_cli import engine, formats, lowrank
from fedlora_cli.adapter import Adapter
from fedlora_cli.aggregation.module import Read, array, read_module, rows, weighted_sum
from fedlora_cli.aggregation.options import Options
from fedlora_cli.aggregation.plan import Plan, make_plan
from fedlora_cli.clients import Clients, read_clients
from fedlora_cli.errors import FedloraError, InputError
from fedlora_cli.methods import METHODS
from fedlora_cli.render.report.compare import CompareReport, MethodRow
from fedlora_cli.spectrum import (
    FloatArray,
    effective_rank,
    energy,
    energy_ratio,
    pooled_energy,
    stable_rank,
)
from fedlora_cli.version import __version__
from fedlora_cli.weights import by_samples

DEFAULTS = Options()


@dataclass(frozen=True, eq=False)
class Contender:
    """A method with its plan for these clients, or the reason why it has none."""

    name: str
    plan: Plan | None
    refused: str | None = None


@dataclass(frozen=True, eq=False)
class ModuleOutcome:
    """One module under M contenders.

    `s` are the singular values of their weighted sums, None where `refused` says why; `gaps`
    (M + 1, M + 1) are ‖ΔW_a - ΔW_b‖_F², the exact sample-weighted mean standing last, `size` is
    the squared norm of that. Seconds are of one core.
    """

    s: tuple[FloatArray | None, ...]
    refused: tuple[str | None, ...]
    gaps: FloatArray
    size: float
    seconds: FloatArray
    shared_seconds: float


def _quiet(stage: str) -> engine.Progress:
    return lambda done, total: None


def compare(
    clients: Sequence[Path | str],
    options: Options = DEFAULTS,
    stage: Callable[[str], engine.Progress] = _quiet,
) -> CompareReport:
    """Every method on the clients in `clients`, with the choices of an aggregation.

    Of these, `method` is not looked at, and a `quorum` adds a row of raFLoRA with it. A method that
    these clients rule out is a row that says why. Raises UsageError and InputError.
    """
    found = read_clients([Path(client) for client in clients], options.samples, options.base)
    previous = None if options.previous is None else formats.read(options.previous)
    # What ails the clients themselves is an error; what ails one method with them is a row.
    reading = make_plan(found.cohort, replace(options, method="raflora"), previous)
    contenders = _contenders(found, options, previous)
    jobs = options.jobs or engine.available_cores()
    torch.linalg.svd(torch.eye(2))  # the first call loads LAPACK, which is no method's time

    def one_module(name: str) -> ModuleOutcome:
        return _compare_module(contenders, reading, name)

    progress = stage("comparing methods")
    outcomes = list(engine.run(one_module, reading.modules, jobs, progress))
    return _report(contenders, reading, outcomes, found)


def _contenders(found: Clients, options: Options, previous: Adapter | None) -> list[Contender]:
    plain = [(name, replace(options, method=name, quorum=None)) for name in METHODS]
    if options.quorum is not None:
        plain.insert(1, (f"raflora, q = {options.quorum:g}", replace(options, method="raflora")))
    return [_contender(name, found, choice, previous) for name, choice in plain]


def _contender(name: str, found: Clients, choice: Options, previous: Adapter | None) -> Contender:
    try:
        return Contender(name, make_plan(found.cohort, choice, previous))
    except FedloraError as error:
        return Contender(name, None, f"{error.where} {error.found}")


def _compare_module(contenders: Sequence[Contender], reading: Plan, name: str) -> ModuleOutcome:
    begin = perf_counter()
    read = read_module(reading, name)
    stack = lowrank.stack([*read.factors, *([read.previous] if read.previous else [])])
    shared_seconds = perf_counter() - begin
    spectra: list[FloatArray | None] = []
    refused: list[str | None] = []
    cores: list[Tensor | None] = []
    seconds = np.zeros(len(contenders))
    for m, one in enumerate(contenders):
        start = perf_counter()
        try:
            s, core = (None, None) if one.plan is None else _outcome(one.plan, name, read, stack)
            refused.append(one.refused)
        except InputError as error:
            s, core = None, None
            refused.append(error.found)
        seconds[m] = perf_counter() - start
        spectra.append(s)
        cores.append(core)
    mean = _exact_mean(reading, name, read, stack)
    return ModuleOutcome(
        s=tuple(spectra),
        refused=tuple(refused),
        gaps=_gaps([*cores, mean]),
        size=float(mean.square().sum()),
        seconds=seconds,
        shared_seconds=shared_seconds,
    )


def _outcome(plan: Plan, name: str, read: Read, stack: lowrank.Stack) -> tuple[FloatArray, Tensor]:
    """The singular values of the method's sum, and the core of what it would write."""
    nothing = torch.zeros_like(stack.lengths)
    if name not in plan.modules:  # only the previous adapter has it, and the method does not ask
        return np.zeros(0), lowrank.core(stack, nothing)
    rule = plan.rule(plan.holdings(name, read.norms))
    target = weighted_sum(plan, name, read, rule)
    if plan.method.merge != "stack":
        merged = target.terms[0]
        return array(lowrank.spectrum(merged)), lowrank.coordinates(stack, merged)
    weights = torch.cat(target.weights)
    if plan.method.compress == "svd":
        core, s = lowrank.truncated_core(stack, weights, plan.rank)
        return array(s), core
    return array(lowrank.singular_values(stack, weights)), lowrank.core(stack, weights)


def _exact_mean(plan: Plan, name: str, read: Read, stack: lowrank.Stack) -> Tensor:
    """The core of sum_k p_k ΔW_k."""
    shares = by_samples(plan.holdings(name, read.norms)).clients
    weights = torch.zeros_like(stack.lengths)
    if read.factors:
        given = torch.cat(rows(shares, read))
        weights[: given.numel()] = given
    return lowrank.core(stack, weights)


def _gaps(cores: Sequence[Tensor | None]) -> FloatArray:
    """Squared distances between cores, not a number where there is none."""
    gaps = np.full((len(cores), len(cores)), np.nan)
    for m, core in enumerate(cores):
        if core is not None:
            gaps[m, m] = 0.0
    for (a, one), (b, other) in combinations(enumerate(cores), 2):
        if one is not None and other is not None:
            gaps[a, b] = gaps[b, a] = float((one - other).square().sum())
    return gaps


def _report(
    contenders: Sequence[Contender],
    reading: Plan,
    outcomes: Sequence[ModuleOutcome],
    found: Clients,
) -> CompareReport:
    cohort = found.cohort
    mean_norm = float(np.sqrt(sum(one.size for one in outcomes)))
    gaps = np.sqrt(np.sum([one.gaps for one in outcomes], axis=0))
    distances = gaps / mean_norm if mean_norm > 0 else np.full(gaps.shape, np.nan)
    methods = tuple(
        _row(one, cohort.shared_rank, m, outcomes, distances[m, -1])
        for m, one in enumerate(contenders)
    )
    uniform = "no sample counts found, all clients count the same; --samples FILE gives them"
    return CompareReport(
        shared_rank=cohort.shared_rank,
        ranks=tuple(client.adapter.rank for client in cohort.clients),
        samples=tuple(client.samples for client in cohort.clients),
        modules=len(reading.modules),
        mean_norm=mean_norm,
        methods=methods,
        distances=tuple(tuple(_finite(v) for v in line[:-1]) for line in distances[:-1]),
        shared_seconds=sum(one.shared_seconds for one in outcomes),
        warnings=(*([uniform] if found.uniform else []), *found.remarks, *cohort.notes),
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
