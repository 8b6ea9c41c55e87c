"""One module under every method: its core, its spectrum, and how far they are apart.

Every method's update lies in the column space of the stacked B and the row space of the stacked A,
so after one QR of both, all of them are cores of S × S, and so are their differences.
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


def compare_part(
    contenders: Sequence[Contender], reading: Plan, names: Sequence[str]
) -> list[ModuleOutcome]:
    """Those modules under every contender, each tensor read once. Raises InputError."""
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
    for m, one in enumerate(contenders):
        start = perf_counter()
        try:
            s, made = (None, None) if one.plan is None else _outcome(one.plan, name, read, total)
            refused.append(one.refused)
        except InputError as error:
            s, made = None, None
            refused.append(error.found)
        seconds[m] = perf_counter() - start
        spectra.append(s)
        # Only the comparison needs the core of factors, so it is nobody's time.
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
    """The singular values of the method's sum, and what it would write: its core, or factors."""
    nothing = torch.zeros_like(total.lengths)
    if name not in plan.modules:  # only the previous adapter has it, and the method does not ask
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
    """Squared distances between cores, not a number where there is none."""
    gaps = np.full((len(cores), len(cores)), np.nan)
    for m, core in enumerate(cores):
        if core is not None:
            gaps[m, m] = 0.0
    for (a, one), (b, other) in combinations(enumerate(cores), 2):
        if one is not None and other is not None:
            gaps[a, b] = gaps[b, a] = float((one - other).square().sum())
    return gaps
