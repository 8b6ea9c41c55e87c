"""The compressions: the factors to write, made from the merged factors of a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedlora_cli.aggregation.outside import compressed_update
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.sums import WeightedSum, array
from fedlora_cli.errors import MethodError
from fedlora_cli.kernels import cost
from fedlora_cli.kernels.dense import Term
from fedlora_cli.kernels.routes import TermSum, decomposed
from fedlora_cli.linalg import lowrank, merging
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.spectrum import energy
from fedlora_cli.methods.checks import called
from fedlora_cli.methods.method import CompressFunction
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
    compress = plan.method.compress
    if isinstance(compress, str):
        return COMPRESSIONS[compress](plan, name, target)
    return _outside(plan, name, compress, target)


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
    """All factors side by side. Raises MethodError if a merge from outside exceeds the rank."""
    rank = sum(term.rank for term in target.terms)
    if plan.method.compress == "none" and plan.rank is not None and rank > plan.rank:
        found = f"its merge has rank {rank} in {name}, above the {plan.rank} of the output"
        raise MethodError(plan.method.title, found, f"give --rank {rank}, or compress by svd")
    total = lowrank.orthogonalize(target.terms)
    s = array(lowrank.singular_values(total, torch.cat(target.weights)))
    return Compressed(merging.concatenate(target.terms, target.weights, plan.scale), s, energy(s))


def _outside(plan: Plan, name: str, compress: CompressFunction, target: WeightedSum) -> Compressed:
    whole, rank = _whole(plan, name, target), plan.rank or 1
    update = lowrank.double(whole.factors)
    made = called(plan.method.title, "compression", compress, update, rank)
    factors = compressed_update(plan.method, name, made, plan.shape(name), rank)
    written = Factors(factors.B / plan.scale, factors.A, plan.scale)
    return Compressed(written, array(lowrank.spectrum(factors)), whole.energy)


#: The compressions of `Method.compress`.
COMPRESSIONS: dict[str, Compression] = {"svd": _truncated, "none": _whole}
