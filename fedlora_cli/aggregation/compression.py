"""The compressions: the factors to write, made from the merged factors of a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.sums import WeightedSum, array
from fedlora_cli.kernels import cost
from fedlora_cli.kernels.dense import Term
from fedlora_cli.kernels.routes import TermSum, decomposed
from fedlora_cli.linalg import lowrank, merging
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.spectrum import energy
from fedlora_cli.methods.weights import FloatArray


@dataclass(frozen=True, eq=False)
class Compressed:
    """The factors, their singular values `s`, and the energy of the sum before the compression."""

    factors: Factors
    s: FloatArray
    energy: float


#: Compresses the sum of the module of that name to the rank of the plan.
Compression = Callable[[Plan, str, WeightedSum], Compressed]


def compressed(plan: Plan, name: str, target: WeightedSum) -> Compressed:
    """The sum, compressed as the method of the plan does it."""
    return COMPRESSIONS[plan.method.compress](plan, name, target)


def _truncated(plan: Plan, name: str, target: WeightedSum) -> Compressed:
    """The best approximation at the rank of the plan, by the fastest route."""
    terms = [*map(Term, target.terms, target.weights)]
    shape, rank = plan.shape(name), plan.rank or 1
    route = cost.choose(shape, sum(term.rank for term in target.terms), rank, plan.dtype).route
    total = TermSum(lambda: terms, shape, plan.options.device, compared=False)
    leading = decomposed(route, total, rank, plan.dtype)[0].leading
    svd = lowrank.Svd(leading.U, leading.s, leading.Vh)
    factors = lowrank.split(svd, plan.options.split, plan.scale)
    return Compressed(factors, array(leading.s), leading.energy)


def _whole(plan: Plan, name: str, target: WeightedSum) -> Compressed:
    """All factors side by side."""
    total = lowrank.orthogonalize(target.terms)
    s = array(lowrank.singular_values(total, torch.cat(target.weights)))
    return Compressed(merging.concatenate(target.terms, target.weights, plan.scale), s, energy(s))


#: The compressions of `Method.compress`.
COMPRESSIONS: dict[str, Compression] = {"svd": _truncated, "none": _whole}
