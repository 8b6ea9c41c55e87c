"""Whether the files that were written hold the update that was asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median_low

import torch

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import read_modules
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.reading import ModuleTerms, read_terms
from fedlora_cli.aggregation.sums import WeightedSum, weighted_sum
from fedlora_cli.errors import InputError, VerificationError
from fedlora_cli.execution import engine
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.reports.aggregate import Verification
from fedlora_cli.rounds.tensors import average_tensor, tensor_names

#: Rounding a factor moves its product by about a third of the spacing eps of its dtype; four times
#: eps is never reached by rounding and always by a wrong weight or scaling.
_ROUNDINGS = 4.0

#: Sums in float64 themselves round; nothing smaller is asked for, relative to what is summed.
_FLOOR = 1e-12


def verify(plan: Plan, folder: Path, jobs: int, progress: engine.Progress) -> Verification:
    """Compare the update of every written module with the weighted sum, forming neither.

    The error of a module is its distance in the Frobenius norm from the weighted sum T, or from the
    best truncation of T to the output rank, relative to T; where all terms are kept, that of each
    term, relative to it or to what is usual, which is how they are rounded. That no other matrix of
    the rank could be nearer to T is checked as well (Eckart and Young), and that the library of the
    format loads all of it by its own rules. Raises VerificationError where the error exceeds four
    roundings of the output dtype, and InputError.
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
        found = read_modules(written, names)
        reads = read_terms(plan, names)
        return {name: _module_error(plan, reads.pop(0), found.pop(name)) for name in names}

    errors: dict[str, float] = {}
    groups = grouped(plan.adapters, plan.modules)
    for some in engine.run(group_errors, groups, jobs, progress):
        errors |= some
    for name in tensor_names(plan):
        if not torch.equal(written.tensors[name].read(), average_tensor(plan, name)):
            raise VerificationError("verification", f"{name} is not the mean", "report this bug")
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        found = f"{worst} is off by {errors[worst]:.1e}, more than {tolerance:.1e}"
        raise VerificationError("verification", found, "nothing was written; report this bug")
    return Verification(max_error=errors[worst], tolerance=tolerance, worst=worst)


def _module_error(plan: Plan, read: ModuleTerms, found: Factors) -> float:
    target = weighted_sum(plan, read, plan.rule(plan.holdings(read.name, read.norms)))
    device = target.terms[0].B.device
    return _error(plan, target, replace(found, B=found.B.to(device), A=found.A.to(device)))


def _error(plan: Plan, target: WeightedSum, found: Factors) -> float:
    """The relative error of one module, less what float64 itself cannot tell."""
    if plan.method.compress == "none":
        return _error_by_term(target, found)
    weights = torch.cat(target.weights)
    total = lowrank.orthogonalize(target.terms)
    size = lowrank.size(total, weights)
    best, s = lowrank.svd(total, weights, found.rank)
    expected = lowrank.split(best, "balanced", 1.0)
    ones = torch.ones(expected.rank, dtype=torch.float64, device=weights.device)
    apart = lowrank.distance([expected], ones, found)
    unavoidable = float(torch.linalg.vector_norm(s[found.rank :]))
    lost = lowrank.outside(target.terms, weights, found)
    norm = float(torch.linalg.vector_norm(s))
    return _relative(max(apart, lost - unavoidable), norm, size)


def _error_by_term(target: WeightedSum, found: Factors) -> float:
    """The largest error of a term, which stand side by side, so that none hides that of another."""
    sizes, apart, start = [], [], 0
    for term, weights in zip(target.terms, target.weights, strict=True):
        own = slice(start, start + term.rank)
        written = Factors(found.B[:, own], found.A[own], found.scale)
        sizes.append(lowrank.size(lowrank.orthogonalize([term]), weights))
        apart.append(lowrank.distance([term], weights, written))
        start += term.rank
    if found.B[:, start:].any():  # what pads the rank adds nothing
        return math.inf
    usual = median_low([size for size in sizes if size > 0] or [0.0])
    pairs = zip(apart, sizes, strict=True)
    return max(_relative(error, max(size, usual), size) for error, size in pairs)


def _relative(error: float, norm: float, size: float) -> float:
    beyond_rounding = max(error - _FLOOR * size, 0.0)
    if norm > 0:
        return beyond_rounding / norm
    return 0.0 if beyond_rounding == 0 else math.inf
