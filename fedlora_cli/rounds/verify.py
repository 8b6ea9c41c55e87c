"""A check that the written files contain the planned update."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import read_modules
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.compression import compressed
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms, read_terms
from fedlora_cli.aggregation.sums import WeightedSum, weighted_sum
from fedlora_cli.errors import InputError, VerificationError
from fedlora_cli.execution import engine
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location
from fedlora_cli.reports.aggregate import Verification
from fedlora_cli.robust.median import lower_median
from fedlora_cli.rounds.tensors import average_tensor, tensor_names

#: Rounding a factor changes the product by about a third of eps of its dtype. Rounding never
#: reaches four times eps; a wrong weight or scaling always does.
_ROUNDINGS = 4.0

#: Rounding of sums in float64, relative to the terms; smaller errors are ignored.
_FLOOR = 1e-12


def verify(plan: Plan, folder: Location, jobs: int, progress: engine.Progress) -> Verification:
    """Compare the update of every written module with the weighted sum T, without forming either.

    The error of a module is the Frobenius distance to T, or to the best truncation of T to the
    output rank, relative to T. If all terms are kept, it is the error of each term, relative to the
    larger of the term and the median term. Two more checks: no other matrix of the rank is nearer
    to T (Eckart and Young), and the library of the format loads the folder. Raises
    VerificationError if an error exceeds four roundings of the output dtype, and InputError.
    """
    try:
        formats.FORMATS[plan.cohort.format].check(folder)
    except InputError as error:
        raise VerificationError("verification", error.found, "report this bug") from None
    written = formats.read(folder)
    if tuple(written.modules) != plan.modules or tuple(written.tensors) != tensor_names(plan):
        raise VerificationError("verification", "other modules were written", "report this bug")
    tolerance = max(_ROUNDINGS * torch.finfo(getattr(torch, plan.dtype)).eps, _FLOOR)

    def group_errors(names: tuple[str, ...]) -> dict[str, float]:
        factors = read_modules(written, names)
        terms = read_terms(plan, names)
        return {name: _module_error(plan, terms.pop(0), factors.pop(name)) for name in names}

    errors: dict[str, float] = {}
    groups = grouped(plan.adapters, plan.modules)
    for group in engine.run(group_errors, groups, jobs, progress):
        errors |= group
    for name in tensor_names(plan):
        if not torch.equal(written.tensors[name].read(), average_tensor(plan, name)):
            raise VerificationError("verification", f"{name} is not the mean", "report this bug")
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        found = f"{worst} is off by {errors[worst]:.1e}, more than {tolerance:.1e}"
        raise VerificationError("verification", found, "nothing was written; report this bug")
    return Verification(max_error=errors[worst], tolerance=tolerance, worst=worst)


def _module_error(plan: Plan, terms: ModuleTerms, written: Factors) -> float:
    target = weighted_sum(plan, terms, plan.rule(plan.holdings(terms.name, terms.norms)))
    device = target.terms[0].B.device
    on_device = replace(written, B=written.B.to(device), A=written.A.to(device))
    return _error(plan, terms.name, target, on_device)


def _error(plan: Plan, name: str, target: WeightedSum, written: Factors) -> float:
    """The relative error of a module, without the rounding of float64."""
    if plan.method.compress == "none":
        return _error_by_term(target, written)
    if not isinstance(plan.method.compress, str):
        made = compressed(plan, name, target).factors
        ones = torch.ones(made.rank, dtype=torch.float64, device=made.B.device)
        size = lowrank.size(lowrank.orthogonalize([made]), ones)
        norm = float(torch.linalg.vector_norm(lowrank.spectrum(made)))
        return _relative(lowrank.distance([made], ones, written), norm, size)
    weights = torch.cat(target.weights)
    total = lowrank.orthogonalize(target.terms)
    size = lowrank.size(total, weights)
    best, s = lowrank.svd(total, weights, written.rank)
    expected = lowrank.split(best, "balanced", 1.0)
    ones = torch.ones(expected.rank, dtype=torch.float64, device=weights.device)
    apart = lowrank.distance([expected], ones, written)
    unavoidable = float(torch.linalg.vector_norm(s[written.rank :]))
    lost = lowrank.outside(target.terms, weights, written)
    norm = float(torch.linalg.vector_norm(s))
    return _relative(max(apart, lost - unavoidable), norm, size)


def _error_by_term(target: WeightedSum, written: Factors) -> float:
    """The largest error of a term: terms stand side by side, so that errors cannot cancel."""
    sizes, apart, start = [], [], 0
    for term, weights in zip(target.terms, target.weights, strict=True):
        columns = slice(start, start + term.rank)
        part = Factors(written.B[:, columns], written.A[columns], written.scale)
        sizes.append(lowrank.size(lowrank.orthogonalize([term]), weights))
        apart.append(lowrank.distance([term], weights, part))
        start += term.rank
    if written.B[:, start:].any():  # padding must be zero
        return math.inf
    middle = lower_median(sizes)
    pairs = zip(apart, sizes, strict=True)
    return max(_relative(error, max(size, middle), size) for error, size in pairs)


def _relative(error: float, norm: float, size: float) -> float:
    beyond_rounding = max(error - _FLOOR * size, 0.0)
    if norm > 0:
        return beyond_rounding / norm
    return 0.0 if beyond_rounding == 0 else math.inf
