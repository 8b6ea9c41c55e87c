"""One module under every method: its core, its spectrum, and the distances between the methods.

The update of every method lies in the column space of the concatenated B and the row space of the
concatenated A. After one QR of both, every update is an S × S core, and so is every difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.compression import compressed
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms, read_terms
from fedlora_cli.aggregation.sums import array, rows, weighted_sum
from fedlora_cli.errors import InputError, MethodError
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.spectrum import FloatArray, energy
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

    `s` are the singular values of the weighted sums, or of the update if a function compresses it;
    `energy` are the energies of the sums; both None for a contender that cannot run, with the
    reason in `refused`. `gaps` (M + 1, M + 1) are ‖ΔW_a - ΔW_b‖_F²; the last row and column are the
    exact sample-weighted mean, and `size` is its squared norm. Seconds are those of one core.
    """

    s: tuple[FloatArray | None, ...]
    energy: tuple[float | None, ...]
    refused: tuple[str | None, ...]
    gaps: FloatArray
    size: float
    seconds: FloatArray
    shared_seconds: float


@dataclass(frozen=True, eq=False)
class _Result:
    """A method's singular values, the energy of its sum, and its update: a core, or factors."""

    s: FloatArray
    energy: float
    update: Tensor | Factors


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
    name, seconds = read.name, np.zeros(len(contenders))
    results: list[_Result | None] = [None] * len(contenders)
    refused = [contender.refused for contender in contenders]

    def fill(by_core: bool, outcome: Callable[[Plan], _Result]) -> None:
        for m, contender in enumerate(contenders):
            if contender.plan is None or _has_core(contender.plan) is not by_core:
                continue
            start = perf_counter()
            try:
                results[m] = outcome(contender.plan)
            except (InputError, MethodError) as error:
                refused[m] = (
                    f"{error.where}: {error.found}"
                    if isinstance(error, MethodError)
                    else error.found
                )
            seconds[m] = perf_counter() - start

    fill(False, lambda plan: _by_factors(plan, name, read))
    begin = perf_counter()
    # Updates of functions from outside need not lie in the spans of the clients' factors.
    outside = [
        result.update
        for result, contender in zip(results, contenders, strict=True)
        if result and isinstance(result.update, Factors) and not _spanned(contender)
    ]
    earlier = [read.previous] if read.previous else []
    total = lowrank.orthogonalize([*read.factors, *earlier, *outside])
    shared_seconds = reading_seconds + perf_counter() - begin
    fill(True, lambda plan: _by_core(plan, name, read, total))
    mean = _exact_mean(reading, name, read, total)
    # The aggregation needs no core of factors, so its time does not count.
    cores = [None if result is None else _core(total, result.update) for result in results]
    return ModuleOutcome(
        s=tuple(None if result is None else result.s for result in results),
        energy=tuple(None if result is None else result.energy for result in results),
        refused=tuple(refused),
        gaps=_gaps([*cores, mean]),
        size=float(mean.square().sum()),
        seconds=seconds,
        shared_seconds=shared_seconds,
    )


def _has_core(plan: Plan) -> bool:
    """Whether the update of the method is a core of the shared sum, without factors of its own."""
    return plan.method.merge == "sum" and isinstance(plan.method.compress, str)


def _spanned(contender: Contender) -> bool:
    return contender.plan is not None and contender.plan.method.within_span


def _by_factors(plan: Plan, name: str, read: ModuleTerms) -> _Result:
    if name not in plan.modules:
        like = read.factors[0] if read.factors else read.previous
        assert like is not None  # noqa: S101 - a module is that of a client or of the previous
        return _Result(np.zeros(0), 0.0, Factors(like.B[:, :0], like.A[:0]))
    target = weighted_sum(plan, read, plan.rule(plan.holdings(name, read.norms)))
    if plan.method.compress == "none" and len(target.terms) == 1:
        [merged] = target.terms
        s = array(lowrank.spectrum(merged))
        return _Result(s, energy(s), merged)
    result = compressed(plan, name, target)
    return _Result(result.s, result.energy, result.factors)


def _by_core(plan: Plan, name: str, read: ModuleTerms, total: lowrank.QrSum) -> _Result:
    weights = torch.zeros_like(total.lengths)
    if name not in plan.modules:  # a module of the previous adapter, which the method ignores
        return _Result(np.zeros(0), 0.0, lowrank.core(total, weights))
    target = weighted_sum(plan, read, plan.rule(plan.holdings(name, read.norms)))
    given = torch.cat(target.weights)
    weights[: given.numel()] = given
    if plan.method.compress == "svd":
        core, all_s = lowrank.truncated_core(total, weights, plan.rank)
    else:
        core, all_s = lowrank.core(total, weights), lowrank.singular_values(total, weights)
    return _Result(array(all_s), energy(array(all_s)), core)


def _core(total: lowrank.QrSum, update: Tensor | Factors) -> Tensor:
    return lowrank.coordinates(total, update) if isinstance(update, Factors) else update


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
