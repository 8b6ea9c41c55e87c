"""One module: rule, merge, compress. Pure but for the tensors it reads, and run for all modules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora_cli import lowrank
from fedlora_cli.adapter import Adapter
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.errors import InputError, without_norm
from fedlora_cli.factors import Factors
from fedlora_cli.stored import cast
from fedlora_cli.weights import FloatArray, Weights, by_samples


@dataclass(frozen=True, eq=False)
class Read:
    """One module's factors of the clients that adapt it, and of earlier global adapters.

    `holders` are the clients' positions in the cohort, `norms` (K,) their ‖ΔW_k‖_F, 0 for clients
    that do not adapt it. `previous` is in SVD order, so that its index i means what the clients'
    does. None of it depends on a method.
    """

    holders: tuple[int, ...]
    factors: tuple[Factors, ...]
    norms: FloatArray
    previous: Factors | None
    before_previous: Factors | None


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """The update that a method asks for before it compresses: sum_j s_j B_j diag(w_j) A_j."""

    terms: tuple[Factors, ...]
    weights: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class ModuleResult:
    """The global factors of one module in the output dtype, and what the report needs.

    Where the method truncates, the directions of `factors` are ordered by energy. `s` are all
    singular values of the weighted sum, `flexlora_s` those under FlexLoRA's weights, `weights` the
    clients' weights (K, R), `client_s` the singular values of every holder's own update.
    """

    name: str
    factors: Factors
    s: FloatArray
    flexlora_s: FloatArray
    weights: FloatArray
    client_s: dict[int, FloatArray]


def aggregate_module(plan: Plan, name: str) -> ModuleResult:
    """The global factors of one module. Raises InputError."""
    read = read_module(plan, name)
    rule = plan.rule(plan.holdings(name, read.norms))
    target = weighted_sum(plan, name, read, rule)
    stack, weights = lowrank.stack(target.terms), torch.cat(target.weights)
    if plan.method.compress == "svd":
        update, s = lowrank.svd(stack, weights, plan.rank)
        factors = lowrank.split(update, plan.options.split, plan.scale)
    else:
        s = lowrank.singular_values(stack, weights)
        factors = lowrank.stacked(target.terms, target.weights, plan.scale)
    own = (lowrank.spectrum(one) for one in read.factors)
    return ModuleResult(
        name=name,
        factors=cast(factors, plan.dtype, name),
        s=array(s),
        flexlora_s=array(_flexlora_spectrum(plan, name, read, stack, weights, s)),
        weights=rule.clients,
        client_s={k: array(one) for k, one in zip(read.holders, own, strict=True)},
    )


def read_module(plan: Plan, name: str) -> Read:
    """The factors of one module, each tensor read once. Raises InputError."""
    clients = plan.cohort.clients
    holders = tuple(k for k, client in enumerate(clients) if name in client.adapter.modules)
    factors = tuple(client_factors(plan, k, name) for k in holders)
    if plan.options.basis == "svd":
        factors = tuple(lowrank.canonical(one) for one in factors)
    norms = np.zeros(len(clients))
    norms[list(holders)] = [lowrank.norm(one) for one in factors]
    if not np.isfinite(norms).all():
        worst = clients[int((~np.isfinite(norms)).argmax())]
        raise without_norm(worst.adapter.path, name)
    previous, before = (
        _factors(plan, adapter, name) if adapter is not None and name in adapter.modules else None
        for adapter in (plan.previous, plan.before_previous)
    )
    previous = None if previous is None else lowrank.canonical(previous)
    return Read(holders, factors, norms, previous, before)


def weighted_sum(plan: Plan, name: str, read: Read, rule: Weights) -> WeightedSum:
    """The terms of the method's sum, the clients' first; averaged factors are a sum of one term.

    Raises InputError.
    """
    weights = rows(rule.clients, read)
    if plan.method.merge == "stack":
        earlier = _earlier(plan, read, rule)
        return WeightedSum((*read.factors, *earlier.terms), (*weights, *earlier.weights))
    try:
        merged = lowrank.MERGES[plan.method.merge](read.factors, weights, plan.scale)
    except lowrank.NotShared as error:
        client = plan.cohort.clients[read.holders[error.position]]
        found = f"lora_A of {name} is not the A of the other clients"
        cure = f"{plan.method.name} needs one frozen A; choose raflora"
        raise InputError(client.adapter.path, found, cure) from None
    return WeightedSum((merged,), (_ones(merged),))


def _earlier(plan: Plan, read: Read, rule: Weights) -> WeightedSum:
    """The terms of earlier global adapters: w_g + β for the previous one, -β for the one before."""
    momentum = plan.options.momentum
    terms: list[Factors] = []
    weights: list[Tensor] = []
    if read.previous is not None:
        kept = np.zeros(read.previous.rank)
        kept[: rule.previous.size] = rule.previous[: read.previous.rank]
        terms.append(read.previous)
        weights.append(_tensor(kept + momentum, read.previous))
    if read.before_previous is not None:
        terms.append(read.before_previous)
        weights.append(-momentum * _ones(read.before_previous))
    return WeightedSum(tuple(terms), tuple(weights))


def _flexlora_spectrum(
    plan: Plan, name: str, read: Read, stack: lowrank.Stack, weights: Tensor, s: Tensor
) -> Tensor:
    """Singular values under FlexLoRA's weights, from the bases at hand where they serve."""
    if not read.factors:
        return s[:0]
    reference = torch.cat(rows(by_samples(plan.holdings(name, read.norms)).clients, read))
    if plan.method.merge != "stack":
        return lowrank.singular_values(lowrank.stack(read.factors), reference)
    # Terms of earlier adapters stand behind the clients' and count nothing here.
    reference = torch.nn.functional.pad(reference, (0, stack.rank - reference.numel()))
    return s if torch.equal(reference, weights) else lowrank.singular_values(stack, reference)


def client_factors(plan: Plan, k: int, name: str) -> Factors:
    """One module of client k, clipped. Raises InputError."""
    factors = _factors(plan, plan.cohort.clients[k].adapter, name)
    return Factors(factors.B, factors.A, factors.scale * plan.clipped(k))


def _factors(plan: Plan, adapter: Adapter, name: str) -> Factors:
    factors = adapter.modules[name].read()
    device = plan.options.device
    return Factors(factors.B.to(device), factors.A.to(device), factors.scale)


def rows(weights: FloatArray, read: Read) -> tuple[Tensor, ...]:
    """The weights (K, R) as one vector of r_k entries for every holder."""
    pairs = zip(read.holders, read.factors, strict=True)
    return tuple(_tensor(weights[k, : one.rank], one) for k, one in pairs)


def _tensor(values: FloatArray, like: Factors) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.B.device)


def array(values: Tensor) -> FloatArray:
    """Singular values as numpy has them."""
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def _ones(like: Factors) -> Tensor:
    return torch.ones(like.rank, dtype=torch.float64, device=like.B.device)
