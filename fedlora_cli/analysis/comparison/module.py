"""One module under every method: its core, its spectrum, and the distances between the methods.

The update of every method lies in the column space of the concatenated B and the row space of the
concatenated A. After one QR of both, every update is an S × S core, and so is every difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms, read_terms
from fedlora_cli.aggregation.sums import array, rows, weighted_sum
from fedlora_cli.errors import InputError
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.spectrum import FloatArray
from fedlora_cli.methods.weights import by_samples


@dataclass(frozen=True, eq=False)
class Contender:
    """A method with its plan for these clients, or the reason why it cannot run."""

    name: str
    plan: Plan | None
    refused: str | None = None


@dataclass(frozen=True, eq=False)
class ModuleOutcome:
    """One module under M contenders.

    `s` are the singular values of the weighted sums, None for a contender that cannot run, with the
    reason in `refused`. `gaps` (M + 1, M + 1) are ‖ΔW_a - ΔW_b‖_F²; the last row and column are the
    exact sample-weighted mean, and `size` is its squared norm. Seconds are those of one core.
    """

    s: tuple[FloatArray | None, ...]
    refused: tuple[str | None, ...]
    gaps: FloatArray
    size: float
    seconds: FloatArray
    shared_seconds: float


def compare_part(
    contenders: Sequence[Contender], reading: Plan, names: Sequence[str]
) -> list[ModuleOutcome]:
    """The outcomes of the named modules; each tensor is read once. Raises InputError."""
    begin = perf_counter()
    reads = read_terms(reading, names)
    reading_seconds = (perf_counter() - begin) / len(names)
    return [_compare(contenders, reading, reads.pop(0), reading_seconds) for _ in names]


def _compare(
    contenders: Sequence[Contender], reading: Plan, read: ModuleTerms, reading_seconds: float
) -> ModuleOutcome:
    begin = perf_counter()
    name = read.name
    total = lowrank.orthogonalize([*read.factors, *([read.previous] if read.previous else [])])
    shared_seconds = reading_seconds + perf_counter() - begin
    spectra: list[FloatArray | None] = []
    refused: list[str | None] = []
    cores: list[Tensor | None] = []
    seconds = np.zeros(len(contenders))
    for m, contender in enumerate(contenders):
        start = perf_counter()
        s, made, reason = None, None, contender.refused
        try:
            if contender.plan is not None:
                s, made = _outcome(contender.plan, name, read, total)
        except InputError as error:
            reason = error.found
        refused.append(reason)
        seconds[m] = perf_counter() - start
        spectra.append(s)
        # The aggregation needs no core of factors, so its time does not count.
        cores.append(lowrank.coordinates(total, made) if isinstance(made, Factors) else made)
    mean = _exact_mean(reading, name, read, total)
    return ModuleOutcome(
        s=tuple(spectra),
        refused=tuple(refused),
        gaps=_gaps([*cores, mean]),
        size=float(mean.square().sum()),
        seconds=seconds,
        shared_seconds=shared_seconds,
    )


def _outcome(
    plan: Plan, name: str, read: ModuleTerms, total: lowrank.QrSum
) -> tuple[FloatArray, Tensor | Factors]:
    """The singular values of the method's sum, and the update: its core, or its factors."""
    nothing = torch.zeros_like(total.lengths)
    if name not in plan.modules:  # a module of the previous adapter, which the method ignores
        return np.zeros(0), lowrank.core(total, nothing)
    rule = plan.rule(plan.holdings(name, read.norms))
    target = weighted_sum(plan, read, rule)
    if plan.method.merge != "sum":
        merged = target.terms[0]
        return array(lowrank.spectrum(merged)), merged
    weights = torch.cat(target.weights)
    if plan.method.compress == "svd":
        core, s = lowrank.truncated_core(total, weights, plan.rank)
        return array(s), core
    return array(lowrank.singular_values(total, weights)), lowrank.core(total, weights)


def _exact_mean(plan: Plan, name: str, read: ModuleTerms, total: lowrank.QrSum) -> Tensor:
    """The core of sum_k p_k ΔW_k."""
    shares = by_samples(plan.holdings(name, read.norms)).clients
    weights = torch.zeros_like(total.lengths)
    if read.factors:
        given = torch.cat(rows(shares, read))
        weights[: given.numel()] = given
    return lowrank.core(total, weights)


def _gaps(cores: Sequence[Tensor | None]) -> FloatArray:
    """Squared distances between cores, NaN for a missing core."""
    gaps = np.full((len(cores), len(cores)), np.nan)
    for m, core in enumerate(cores):
        if core is not None:
            gaps[m, m] = 0.0
    for (a, left), (b, right) in combinations(enumerate(cores), 2):
        if left is not None and right is not None:
            gaps[a, b] = gaps[b, a] = float((left - right).square().sum())
    return gaps
