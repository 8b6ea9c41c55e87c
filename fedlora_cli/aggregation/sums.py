"""The weighted sum that a method asks for in one module, before it compresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms
from fedlora_cli.errors import InputError
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import CANCELLED
from fedlora_cli.methods.weights import FloatArray, Weights

#: The relative error of a sum at which a client is lost in it: float32 factors keep less than that.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_j s_j B_j diag(w_j) A_j, the clients' terms first."""

    terms: tuple[Factors, ...]
    weights: tuple[Tensor, ...]


def weighted_sum(plan: Plan, read: ModuleTerms, rule: Weights) -> WeightedSum:
    """The terms of the method's sum; averaged factors are a sum of one term. Raises InputError."""
    weights = rows(rule.clients, read)
    if plan.method.merge == "sum":
        earlier = earlier_terms(plan, read, rule)
        return WeightedSum((*read.factors, *earlier.terms), (*weights, *earlier.weights))
    if plan.method.merge == "average":
        _check_averages(plan, read, weights)
    try:
        merged = lowrank.MERGES[plan.method.merge](read.factors, weights, plan.scale)
    except lowrank.NotShared as error:
        client = plan.cohort.clients[read.holders[error.position]]
        found = f"lora_A of {read.name} is not the A of the other clients"
        cure = f"{plan.method.name} needs one frozen A; choose raflora"
        raise InputError(client.adapter.path, found, cure) from None
    return WeightedSum((merged,), (_ones(merged),))


def check_cancelled(plan: Plan, read: ModuleTerms, target: WeightedSum, norm: float) -> None:
    """Whether the sum, of this norm, was not lost in the rounding of clients that cancel out.

    It is where that rounding, as `lowrank.svd` counts it, is more than ROUNDING of what a client
    usually adds, and of the sum. The largest client is named. Raises InputError.
    """
    if plan.method.merge != "sum":
        return
    pairs = zip(target.weights, read.sizes, strict=False)  # earlier adapters stand last
    added = [float(weights.abs().max()) * own.pieces for weights, own in pairs]
    usual = _usual(added)
    lost = float(np.finfo(np.float64).eps) * max(plan.shape(read.name)) * sum(added)
    if usual > 0 and lost > ROUNDING * max(usual, norm):
        found = f"{read.name} is {max(added) / usual:.1g} times as large as is usual"
        raise _too_large(plan, read, added, f"its update of {found}, and others cancel it")


def _check_averages(plan: Plan, read: ModuleTerms, weights: Sequence[Tensor]) -> None:
    """Whether no client's factor is so large that the mean of the factors loses all others, and its
    product is that of this client's B with all A, or with all B of its A. Raises InputError.
    """
    counted = [
        one if bool(weight.any()) else None
        for one, weight in zip(read.factors, weights, strict=True)
    ]
    for side in ("B", "A"):
        norms = [0.0 if one is None else _length(one, side) for one in counted]
        usual = _usual(norms)
        # Not `>`: squares may leave the range of float64.
        if usual > 0 and not max(norms) <= CANCELLED * usual:
            times = f"{max(norms) / usual:.1g} times as large as is usual"
            found = f"its lora_{side} of {read.name} is {times}, too large for a mean of factors"
            raise _too_large(plan, read, norms, found)


def _length(factors: Factors, side: str) -> float:
    """The norm of lora_B or lora_A as it counts in a mean, with its share of the scale."""
    values: Tensor = getattr(factors, side).double()
    return float(torch.linalg.vector_norm(values)) * math.sqrt(abs(factors.scale))


def _usual(values: Sequence[float]) -> float:
    """The lower median of what is above 0; 0 without any."""
    positive = [value for value in values if value > 0]
    return median_low(positive) if positive else 0.0


def _too_large(plan: Plan, read: ModuleTerms, values: Sequence[float], found: str) -> InputError:
    """The error that names the client of the largest value."""
    client = plan.cohort.clients[read.holders[int(np.argmax(values))]]
    return InputError(client.adapter.path, found, "leave this adapter out")


def earlier_terms(plan: Plan, read: ModuleTerms, rule: Weights) -> WeightedSum:
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


def rows(weights: FloatArray, read: ModuleTerms) -> tuple[Tensor, ...]:
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
