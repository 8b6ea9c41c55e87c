"""The aggregation of a module: read its factors, sum them by the method's rule, truncate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.decompose import Decomposed, decomposed, summed
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms, read_clients, read_earlier, read_terms
from fedlora_cli.aggregation.routes import route_of
from fedlora_cli.aggregation.sums import array, rows, weighted_sum
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.casting import at_rank, cast
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import Sizes
from fedlora_cli.linalg.spectrum import energy, rank_for_energy
from fedlora_cli.methods.weights import FloatArray, by_samples


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of a module that the report needs.

    - `s`: singular values of the written update; `energy`: that of the weighted sum.
    - `flexlora_s`: as many singular values of the sum under FlexLoRA's weights.
    - `weights`: the clients' weights (K, R).
    - `client_s`, `client_sizes`: singular values and sizes of each holder's update.
    """

    name: str
    s: FloatArray
    energy: float
    flexlora_s: FloatArray
    weights: FloatArray
    client_s: dict[int, FloatArray]
    client_sizes: dict[int, Sizes]


def aggregate_part(part: tuple[Plan, Sequence[str]]) -> list[tuple[Factors, Outcome]]:
    """The global factors of these modules, as written, and their outcomes. Raises InputError.

    If the method truncates, rank indices are ordered by energy.
    """
    plan, names = part
    with _stream(plan.options.device):
        return _aggregate(plan, names)


def _stream(device: str) -> AbstractContextManager[Any]:
    """On a GPU, a stream for each caller: copies of one caller overlap with another's products."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    cuda: Any = torch.cuda  # not fully typed
    stream: AbstractContextManager[Any] = cuda.stream(cuda.Stream(device))
    return stream


def _aggregate(plan: Plan, names: Sequence[str]) -> list[tuple[Factors, Outcome]]:
    if plan.method.compress == "none":
        return [_merged(plan, one) for one in read_terms(plan, names)]
    rank = plan.rank or 1
    # What is large by itself is summed client by client, so that never all of them are in memory.
    if len(names) == 1 and _is_dense(plan, names[0]):
        [name] = names
        [read] = read_earlier(plan, names)
        found = summed(plan, read, rank, lambda: read_clients(plan, name))
        return [_truncated(plan, name, found)]
    reads = read_terms(plan, names)
    return [_truncated(plan, name, _decomposed(plan, reads.pop(0), rank)) for name in names]


def _is_dense(plan: Plan, name: str) -> bool:
    return route_of(plan, name).route == "dense"


def _decomposed(plan: Plan, read: ModuleTerms, rank: int) -> Decomposed:
    if not _is_dense(plan, read.name):
        return decomposed(plan, read, rank)
    return summed(
        plan, read, rank, lambda: zip(read.holders, read.factors, read.sizes, strict=True)
    )


def ranks_for_energy(part: tuple[Plan, Sequence[str]]) -> list[int]:
    """The smallest rank of each module that keeps the share of `--energy`. Raises InputError."""
    plan, names = part
    ranks = []
    for read in read_terms(plan, names):
        target = weighted_sum(plan, read, plan.rule(plan.holdings(read.name, read.norms)))
        s = lowrank.singular_values(lowrank.orthogonalize(target.terms), torch.cat(target.weights))
        ranks.append(rank_for_energy(array(s), plan.options.energy or 1.0))
    return ranks


def _truncated(plan: Plan, name: str, found: Decomposed) -> tuple[Factors, Outcome]:
    """The best approximation of the sum at the output's rank."""
    factors = lowrank.split(found.update, plan.options.split, plan.scale)
    rank = plan.rank or factors.rank
    holdings = plan.holdings(name, np.zeros(len(plan.cohort.clients)))
    return at_rank(cast(factors, plan.dtype, name), rank, name), Outcome(
        name=name,
        s=array(found.update.s),
        energy=found.energy,
        flexlora_s=array(found.flexlora_s[:rank]),
        weights=plan.rule(holdings).clients,
        client_s=found.client_s,
        client_sizes=found.client_sizes,
    )


def _merged(plan: Plan, read: ModuleTerms) -> tuple[Factors, Outcome]:
    """The result of a method that does not truncate: concatenated or averaged factors."""
    holdings = plan.holdings(read.name, read.norms)
    rule = plan.rule(holdings)
    target = weighted_sum(plan, read, rule)
    total = lowrank.orthogonalize(target.terms)
    s = lowrank.singular_values(total, torch.cat(target.weights))
    factors = lowrank.concatenate(target.terms, target.weights, plan.scale)
    own = zip(read.holders, read.factors, strict=True)
    rank = plan.rank or factors.rank
    return at_rank(cast(factors, plan.dtype, read.name), rank, read.name), Outcome(
        name=read.name,
        s=array(s),
        energy=energy(array(s)),
        flexlora_s=array(_flexlora_spectrum(read, rows(by_samples(holdings).clients, read)))[:rank],
        weights=rule.clients,
        client_s={k: array(lowrank.spectrum(one)) for k, one in own},
        client_sizes=dict(zip(read.holders, read.sizes, strict=True)),
    )


def _flexlora_spectrum(read: ModuleTerms, weights: tuple[Tensor, ...]) -> Tensor:
    """All singular values under FlexLoRA's weights."""
    if not read.factors:
        return torch.zeros(0)
    return lowrank.singular_values(lowrank.orthogonalize(read.factors), torch.cat(weights))
