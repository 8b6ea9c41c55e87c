"""The weighted sum that a method asks for in one module, before it compresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora_cli import lowrank
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import Read
from fedlora_cli.errors import InputError
from fedlora_cli.factors import Factors
from fedlora_cli.weights import FloatArray, Weights


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_j s_j B_j diag(w_j) A_j, the clients' terms first."""

    terms: tuple[Factors, ...]
    weights: tuple[Tensor, ...]


def weighted_sum(plan: Plan, read: Read, rule: Weights) -> WeightedSum:
    """The terms of the method's sum; averaged factors are a sum of one term. Raises InputError."""
    weights = rows(rule.clients, read)
    if plan.method.merge == "stack":
        earlier = earlier_terms(plan, read, rule)
        return WeightedSum((*read.factors, *earlier.terms), (*weights, *earlier.weights))
    try:
        merged = lowrank.MERGES[plan.method.merge](read.factors, weights, plan.scale)
    except lowrank.NotShared as error:
        client = plan.cohort.clients[read.holders[error.position]]
        found = f"lora_A of {read.name} is not the A of the other clients"
        cure = f"{plan.method.name} needs one frozen A; choose raflora"
        raise InputError(client.adapter.path, found, cure) from None
    return WeightedSum((merged,), (_ones(merged),))


def earlier_terms(plan: Plan, read: Read, rule: Weights) -> WeightedSum:
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


def rows(weights: FloatArray, read: Read) -> tuple[Tensor, ...]:
    """The weights (K, R) as one vector of r_k entries for every holder."""
    pairs = zip(read.holders, read.factors, strict=True)
    return tuple(row(weights[k], one) for k, one in pairs)


def row(weights: FloatArray, factors: Factors) -> Tensor:
    """One client's weights (R,) as a vector of r_k entries."""
    return _tensor(weights[: factors.rank], factors)


def array(values: Tensor) -> FloatArray:
    """Singular values as numpy has them."""
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def _tensor(values: FloatArray, like: Factors) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.B.device)


def _ones(like: Factors) -> Tensor:
    return torch.ones(like.rank, dtype=torch.float64, device=like.B.device)
