"""The merges: the sum of one module that a method computes before it compresses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.aggregation.outside import merged_update
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms
from fedlora_cli.errors import InputError
from fedlora_cli.linalg import lowrank, merging
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import CANCELLED
from fedlora_cli.methods.checks import called
from fedlora_cli.methods.method import MergeFunction, Method
from fedlora_cli.methods.weights import FloatArray, Weights
from fedlora_cli.robust.median import lower_median

#: Largest relative error of a sum. Beyond it, a client would be lost in the rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_j s_j B_j diag(w_j) A_j, the clients' terms first."""

    terms: tuple[Factors, ...]
    weights: tuple[Tensor, ...]


#: The merge of the clients' factors in a module under their weights. Raises InputError.
Merge = Callable[[Plan, ModuleTerms, Sequence[Tensor]], WeightedSum]


def weighted_sum(plan: Plan, read: ModuleTerms, rule: Weights) -> WeightedSum:
    """The merged factors of the clients, then the terms of earlier adapters. Raises InputError."""
    merge, weights = plan.method.merge, rows(rule.clients, read)
    if isinstance(merge, str):
        merged = MERGES[merge](plan, read, weights)
    else:
        merged = _outside(plan.method, merge, read, weights)
    earlier = earlier_terms(plan, read, rule)
    return WeightedSum((*merged.terms, *earlier.terms), (*merged.weights, *earlier.weights))


def _each(plan: Plan, read: ModuleTerms, weights: Sequence[Tensor]) -> WeightedSum:
    return WeightedSum(read.factors, tuple(weights))


def _averaged(plan: Plan, read: ModuleTerms, weights: Sequence[Tensor]) -> WeightedSum:
    _check_averages(plan, read, weights)
    return _single(merging.averaged(read.factors, weights, plan.scale))


def _shared(plan: Plan, read: ModuleTerms, weights: Sequence[Tensor]) -> WeightedSum:
    try:
        return _single(merging.shared(read.factors, weights, plan.scale))
    except merging.NotShared as error:
        client = plan.cohort.clients[read.holders[error.position]]
        found = f"lora_A of {read.name} is not the A of the other clients"
        cure = f"{plan.method.name} needs one frozen A; choose raflora"
        raise InputError(client.adapter.path, found, cure) from None


def _outside(
    method: Method, merge: MergeFunction, read: ModuleTerms, weights: Sequence[Tensor]
) -> WeightedSum:
    if not read.factors:  # a module of earlier adapters alone
        return WeightedSum((), ())
    updates = tuple(map(lowrank.double, read.factors))
    made = called(method.title, "merge", merge, updates, weights)
    merged, device = merged_update(method, read.name, made, updates[0].shape), updates[0].B.device
    return _single(Factors(merged.B.to(device), merged.A.to(device)))


def _single(merged: Factors) -> WeightedSum:
    return WeightedSum((merged,), (_ones(merged),))


#: The merges of `Method.merge`.
MERGES: dict[str, Merge] = {"sum": _each, "average": _averaged, "shared": _shared}


def check_cancelled(plan: Plan, name: str, added: Mapping[int, float], norm: float) -> None:
    """Raises InputError if clients that cancel out leave a sum that is mostly rounding.

    `added` is the size of each holder's pieces under its largest weight, `norm` that of the sum.
    The rounding that `lowrank.svd` assumes must be at most ROUNDING of the larger of `norm` and the
    median of `added`. The error names the largest client.
    """
    sizes = [*added.values()]
    usual = lower_median(sizes)
    lost = float(np.finfo(np.float64).eps) * max(plan.shape(name)) * sum(sizes)
    if usual > 0 and lost > ROUNDING * max(usual, norm):
        found = f"its update of {name} is {max(sizes) / usual:.1g} times the median"
        raise _too_large(plan, added, f"{found}, and other clients cancel it")


def _check_averages(plan: Plan, read: ModuleTerms, weights: Sequence[Tensor]) -> None:
    """Raises InputError if a client's factor is so large that the mean of factors loses the others.

    The product of the means would be this client's B with all A, or all B with this client's A.
    """
    for side in ("B", "A"):
        pairs = zip(read.factors, weights, strict=True)
        norms = [_length(factors, side) if bool(w.any()) else 0.0 for factors, w in pairs]
        usual = lower_median(norms)
        # `not <=` is also true for NaN, which an overflow may give.
        if usual > 0 and not max(norms) <= CANCELLED * usual:
            times = f"{max(norms) / usual:.1g} times the median"
            found = f"its lora_{side} of {read.name} is {times}, too large for a mean of factors"
            raise _too_large(plan, dict(zip(read.holders, norms, strict=True)), found)


def _length(factors: Factors, side: str) -> float:
    """The norm of lora_B or lora_A, times the root of the scale, as in a mean of factors."""
    values: Tensor = getattr(factors, side).double()
    return float(torch.linalg.vector_norm(values)) * math.sqrt(abs(factors.scale))


def _too_large(plan: Plan, sizes: Mapping[int, float], found: str) -> InputError:
    """The error for the client with the largest size."""
    client = plan.cohort.clients[[*sizes][int(np.argmax([*sizes.values()]))]]
    return InputError(client.adapter.path, found, "leave this adapter out")


def earlier_terms(plan: Plan, read: ModuleTerms, rule: Weights) -> WeightedSum:
    """The terms of earlier global adapters: w_g + β for the previous one, -β for the one before."""
    momentum = plan.options.momentum
    terms: list[Factors] = []
    weights: list[Tensor] = []
    # Several plans may share the factors that were read for the largest of them.
    if read.previous is not None and plan.previous is not None:
        kept = np.zeros(read.previous.rank)
        kept[: rule.previous.size] = rule.previous[: read.previous.rank]
        terms.append(read.previous)
        weights.append(_tensor(kept + momentum, read.previous))
    if read.before_previous is not None and plan.before_previous is not None:
        terms.append(read.before_previous)
        weights.append(-momentum * _ones(read.before_previous))
    return WeightedSum(tuple(terms), tuple(weights))


def rows(weights: FloatArray, read: ModuleTerms) -> tuple[Tensor, ...]:
    """The weights (K, R) as a vector of r_k entries for every holder."""
    pairs = zip(read.holders, read.factors, strict=True)
    return tuple(row(weights[k], factors) for k, factors in pairs)


def row(weights: FloatArray, factors: Factors) -> Tensor:
    """A client's weights (R,) as a vector of r_k entries."""
    return _tensor(weights[: factors.rank], factors)


def array(values: Tensor) -> FloatArray:
    """Singular values as a NumPy array."""
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def _tensor(values: FloatArray, like: Factors) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.B.device)


def _ones(like: Factors) -> Tensor:
    return torch.ones(like.rank, dtype=torch.float64, device=like.B.device)
