"""The aggregation of a module: read its factors, sum them by the method's rule, truncate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.compression import compressed
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms, read_clients, read_earlier, read_terms
from fedlora_cli.aggregation.routes import route_of
from fedlora_cli.aggregation.sums import (
    array,
    check_cancelled,
    earlier_terms,
    row,
    rows,
    weighted_sum,
)
from fedlora_cli.kernels.dense import Term
from fedlora_cli.kernels.routes import Decomposed, TermSum, decomposed
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.casting import at_rank, cast
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import Sizes
from fedlora_cli.linalg.spectrum import rank_for_energy
from fedlora_cli.methods.installed import check_same
from fedlora_cli.methods.weights import FloatArray, Weights, by_samples

#: Starts a new pass over holders, with the factors and sizes of each. Raises InputError.
Clients = Callable[[], Iterable[tuple[int, Factors, Sizes]]]


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
    check_same(plan.method)
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
    if not plan.method.streams:
        return [_merged(plan, read) for read in read_terms(plan, names)]
    # A large module is summed client by client, so that only one client's factors are in memory.
    if len(names) == 1 and route_of(plan, names[0]).route == "dense":
        [earlier] = read_earlier(plan, names)
        return [_truncated(plan, earlier, lambda: read_clients(plan, earlier.name))]
    reads, results = read_terms(plan, names), []
    while reads:
        read = reads.pop(0)  # frees a module's memory once it is aggregated
        results.append(_truncated(plan, read, read.by_holder))
    return results


def ranks_for_energy(part: tuple[Plan, Sequence[str]]) -> list[int]:
    """The smallest rank of each module that keeps the share of `--energy`. Raises InputError."""
    plan, names = part
    check_same(plan.method)
    ranks = []
    for read in read_terms(plan, names):
        target = weighted_sum(plan, read, plan.rule(plan.holdings(read.name, read.norms)))
        s = lowrank.singular_values(lowrank.orthogonalize(target.terms), torch.cat(target.weights))
        ranks.append(rank_for_energy(array(s), plan.options.energy or 1.0))
    return ranks


def _truncated(plan: Plan, read: ModuleTerms, clients: Clients) -> tuple[Factors, Outcome]:
    """The best approximation, at the output's rank, of the sum of clients and earlier adapters."""
    name, rank = read.name, plan.rank or 1
    holdings = plan.holdings(name, np.full(read.clients, np.nan))
    rule, flexlora = plan.rule(holdings), by_samples(holdings)
    earlier = earlier_terms(plan, read, rule)
    client_sizes: dict[int, Sizes] = {}
    added: dict[int, float] = {}

    def terms() -> Iterator[Term]:
        for k, factors, sizes in clients():
            client_sizes[k] = sizes
            added[k] = _added(rule, k, factors, sizes)
            yield Term(factors, row(rule.clients[k], factors), row(flexlora.clients[k], factors))
        yield from map(Term, earlier.terms, earlier.weights)

    compared = bool(earlier.terms) or not np.array_equal(rule.clients, flexlora.clients)
    total = TermSum(terms, plan.shape(name), plan.options.device, compared)
    result = _decomposed(plan, name, total, added)
    leading = result.leading
    svd = lowrank.Svd(leading.U, leading.s, leading.Vh)
    factors = lowrank.split(svd, plan.options.split, plan.scale)
    return at_rank(cast(factors, plan.dtype, name), rank, name), Outcome(
        name=name,
        s=array(leading.s),
        energy=leading.energy,
        flexlora_s=array(result.reference_s),
        weights=rule.clients,
        client_s=dict(zip(client_sizes, map(array, result.spectra), strict=True)),
        client_sizes=client_sizes,
    )


def _added(rule: Weights, k: int, factors: Factors, sizes: Sizes) -> float:
    """The size of the pieces of client k under its largest weight."""
    return sizes.pieces * float(np.abs(rule.clients[k, : factors.rank]).max())


def _decomposed(plan: Plan, name: str, total: TermSum, added: Mapping[int, float]) -> Decomposed:
    """The result of the fastest route, or of `qr` if that route fails. Raises InputError.

    `added` is that of `check_cancelled`, known after a pass over the terms.
    """
    result, exact = decomposed(route_of(plan, name).route, total, plan.rank or 1, plan.dtype)
    if exact:
        check_cancelled(plan, name, added, math.sqrt(result.leading.energy))
    return result


def _merged(plan: Plan, read: ModuleTerms) -> tuple[Factors, Outcome]:
    """The result of any merge and compression, with all factors in memory."""
    holdings = plan.holdings(read.name, read.norms)
    rule = plan.rule(holdings)
    result = compressed(plan, read.name, weighted_sum(plan, read, rule))
    if plan.method.merge == "sum" and plan.method.compress != "none":
        added = {k: _added(rule, k, update, sizes) for k, update, sizes in read.by_holder()}
        check_cancelled(plan, read.name, added, math.sqrt(result.energy))
    rank = plan.rank or result.factors.rank
    return at_rank(cast(result.factors, plan.dtype, read.name), rank, read.name), Outcome(
        name=read.name,
        s=result.s,
        energy=result.energy,
        flexlora_s=array(_flexlora_spectrum(read, rows(by_samples(holdings).clients, read)))[:rank],
        weights=rule.clients,
        client_s={k: array(lowrank.spectrum(update)) for k, update, _ in read.by_holder()},
        client_sizes={k: sizes for k, _, sizes in read.by_holder()},
    )


def _flexlora_spectrum(read: ModuleTerms, weights: tuple[Tensor, ...]) -> Tensor:
    """All singular values under FlexLoRA's weights."""
    if not read.factors:
        return torch.zeros(0)
    return lowrank.singular_values(lowrank.orthogonalize(read.factors), torch.cat(weights))
