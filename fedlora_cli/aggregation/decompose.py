"""The leading directions of the weighted sum of a module, by the route that costs least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms
from fedlora_cli.aggregation.routes import route_of
from fedlora_cli.aggregation.sums import (
    WeightedSum,
    array,
    check_cancelled,
    earlier_terms,
    row,
    rows,
    weighted_sum,
)
from fedlora_cli.kernels import dense, factored, gram
from fedlora_cli.kernels.leading import Unresolved
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.lowrank import Svd
from fedlora_cli.linalg.sizes import Sizes
from fedlora_cli.linalg.spectrum import energy
from fedlora_cli.methods.weights import FloatArray, by_samples


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The leading directions of a sum, its energy, the leading singular values under FlexLoRA's
    weights, and the singular values and the sizes of every holder's own update.
    """

    update: Svd
    energy: float
    flexlora_s: Tensor
    client_s: dict[int, FloatArray]
    client_sizes: dict[int, Sizes]


#: The factors of a module and their sizes, client by client: holders, in their order. Raises
#: InputError.
Terms = Callable[[], Iterable[tuple[int, Factors, Sizes]]]


def decomposed(plan: Plan, read: ModuleTerms, rank: int) -> Decomposed:
    """The sum of what was read, without a dense matrix. Raises InputError."""
    rule = plan.rule(plan.holdings(read.name, np.zeros(read.clients)))
    target = weighted_sum(plan, read, rule)
    route = route_of(plan, read.name).route
    if route in _FAST:
        with suppress(Unresolved):
            return _FAST[route](plan, read, target, rank)
    return _by_stack(plan, read, target, rank)


def _by_grams(plan: Plan, read: ModuleTerms, target: WeightedSum, rank: int) -> Decomposed:
    """Through Gram matrices, which hold the norms and spectra of the clients too."""
    grams = gram.prepare(target.terms, plan.dtype)
    weights = torch.cat(target.weights)
    found = gram.leading(grams, weights, rank)
    reference = _reference(plan, read, weights)
    same = torch.equal(reference, weights)
    return Decomposed(
        update=Svd(found.U, found.s, found.Vh),
        energy=found.energy,
        flexlora_s=found.s if same else gram.singular_values(grams, reference, rank),
        client_s={k: _by_gram(grams, i, read.factors[i]) for i, k in enumerate(read.holders)},
        client_sizes=dict(zip(read.holders, read.sizes, strict=True)),
    )


def _by_factors(plan: Plan, read: ModuleTerms, target: WeightedSum, rank: int) -> Decomposed:
    """Through products with the factors alone."""
    concatenated = factored.prepare(target.terms, plan.dtype)
    weights = torch.cat(target.weights)
    found = factored.leading(concatenated, weights, rank, plan.dtype)
    reference = _reference(plan, read, weights)
    same = torch.equal(reference, weights)
    other = found.s
    if not same:
        other = factored.singular_values(concatenated, reference, rank, plan.dtype)
    return Decomposed(
        update=Svd(found.U, found.s, found.Vh),
        energy=found.energy,
        flexlora_s=other,
        client_s={
            k: _spectrum(plan, one) for k, one in zip(read.holders, read.factors, strict=True)
        },
        client_sizes=dict(zip(read.holders, read.sizes, strict=True)),
    )


def _by_stack(plan: Plan, read: ModuleTerms, target: WeightedSum, rank: int) -> Decomposed:
    """Through QR in float64: right for any input."""
    total, weights = lowrank.orthogonalize(target.terms), torch.cat(target.weights)
    update, s = lowrank.svd(total, weights, rank)
    check_cancelled(plan, read, target, float(torch.linalg.vector_norm(s)))
    reference = _reference(plan, read, weights)
    same = torch.equal(reference, weights)
    return Decomposed(
        update=update,
        energy=energy(array(s)),
        flexlora_s=s if same else lowrank.singular_values(total, reference),
        client_s={
            k: array(lowrank.spectrum(one))
            for k, one in zip(read.holders, read.factors, strict=True)
        },
        client_sizes=dict(zip(read.holders, read.sizes, strict=True)),
    )


_FAST = {"gram": _by_grams, "factored": _by_factors}


def summed(plan: Plan, read: ModuleTerms, rank: int, clients: Terms) -> Decomposed:
    """The sum as a dense matrix, client by client; those in `read` do not count. Raises
    InputError.
    """
    # Products in float32 are exact enough for an output of 16 bits alone.
    short = plan.dtype in ("float16", "bfloat16")
    for dtype in (torch.float32, torch.float64) if short else (torch.float64,):
        with suppress(Unresolved):
            return _by_dense(plan, read, rank, clients, dtype)
    held = list(clients())
    holders, factors, sizes = (tuple(column) for column in zip(*held, strict=True))
    whole = replace(read, holders=holders, factors=factors, sizes=sizes)
    rule = plan.rule(plan.holdings(read.name, np.zeros(read.clients)))
    return _by_stack(plan, whole, weighted_sum(plan, whole, rule), rank)


def _by_dense(
    plan: Plan, read: ModuleTerms, rank: int, clients: Terms, dtype: torch.dtype
) -> Decomposed:
    name = read.name
    holdings = plan.holdings(name, np.zeros(len(plan.cohort.clients)))
    rule, flexlora = plan.rule(holdings), by_samples(holdings)
    others = earlier_terms(plan, read, rule)
    spectra: dict[int, FloatArray] = {}
    sizes: dict[int, Sizes] = {}

    def terms() -> Iterator[dense.Term]:
        for k, factors, own in clients():
            spectra[k], sizes[k] = _spectrum(plan, factors), own
            yield dense.Term(
                factors, row(rule.clients[k], factors), row(flexlora.clients[k], factors)
            )
        for factors, weights in zip(others.terms, others.weights, strict=True):
            yield dense.Term(factors, weights)

    # Other methods than FlexLoRA want its sum as well.
    apart = bool(others.terms) or not np.array_equal(rule.clients, flexlora.clients)
    device = plan.options.device
    whole, reference = dense.accumulate(terms(), plan.shape(name), dtype, device, reference=apart)
    found = dense.leading(whole, rank, plan.dtype)
    del whole
    other = found.s
    if reference is not None:
        other = dense.singular_values(reference, rank, plan.dtype)
    return Decomposed(Svd(found.U, found.s, found.Vh), found.energy, other, spectra, sizes)


def _spectrum(plan: Plan, factors: Factors) -> FloatArray:
    """The singular values of a client's own update."""
    if plan.dtype != "float64":
        with suppress(Unresolved):
            return _by_gram(gram.prepare([factors], plan.dtype), 0, factors)
    return array(lowrank.spectrum(factors))


def _by_gram(grams: gram.Grams, i: int, factors: Factors) -> FloatArray:
    """The singular values of the update of term i, whose factors are these."""
    with suppress(Unresolved):
        return array(gram.spectrum(grams, i))
    return array(lowrank.spectrum(factors))


def _reference(plan: Plan, read: ModuleTerms, weights: Tensor) -> Tensor:
    """FlexLoRA's weights of the terms; those of earlier adapters stand last and count nothing."""
    shares = by_samples(plan.holdings(read.name, np.zeros(read.clients)))
    own = torch.cat([weights[:0], *rows(shares.clients, read)])
    return torch.nn.functional.pad(own, (0, weights.numel() - own.numel()))
