"""Whether the files that were written hold the update that was asked for."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fedlora_cli import engine, formats, lowrank
from fedlora_cli.adapter import Adapter
from fedlora_cli.errors import VerificationError
from fedlora_cli.factors import Factors
from fedlora_cli.render.report import Verification
from fedlora_cli.rounds.module import read_module, weighted_sum
from fedlora_cli.rounds.plan import Plan
from fedlora_cli.rounds.tensors import average_tensor, tensor_names

#: Rounding a factor moves its product by about a third of the spacing eps of its dtype; four times
#: eps is never reached by rounding and always by a wrong weight or scaling.
_ROUNDINGS = 4.0

#: Sums in float64 themselves round; nothing is asked for below this.
_FLOOR = 1e-12


def verify(plan: Plan, folder: Path, jobs: int, progress: engine.Progress) -> Verification:
    """Compare the update of every written module with the weighted sum, forming neither.

    The error of a module is relative to the norm of the weighted sum T, in the Frobenius norm, and
    leaves out what truncation to the output rank must cost (Eckart and Young). Raises
    VerificationError where it exceeds four roundings of the output dtype, and InputError.
    """
    written = formats.read(folder)
    if tuple(written.modules) != plan.modules or tuple(written.tensors) != tensor_names(plan):
        raise VerificationError(folder, "other modules than asked for", "report this as a bug")
    tolerance = max(_ROUNDINGS * torch.finfo(getattr(torch, plan.dtype)).eps, _FLOOR)

    def module_error(name: str) -> float:
        target = weighted_sum(plan, name, read_module(plan, name))
        return _module_error(plan, target.terms, torch.cat(target.weights), written, name)

    names = [*plan.modules]
    errors = dict(zip(names, engine.run(module_error, names, jobs, progress), strict=True))
    for name in tensor_names(plan):
        if not torch.equal(written.tensors[name].read(), average_tensor(plan, name)):
            raise VerificationError(folder, f"{name} is not the mean", "report this as a bug")
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        found = f"{worst} is off by {errors[worst]:.1e}, more than {tolerance:.1e}"
        raise VerificationError(folder, found, "nothing was written; try --dtype float32")
    return Verification(max_error=errors[worst], tolerance=tolerance, worst=worst)


def _module_error(
    plan: Plan, terms: tuple[Factors, ...], weights: torch.Tensor, written: Adapter, name: str
) -> float:
    found = written.modules[name].read()
    found = Factors(found.B.to(weights.device), found.A.to(weights.device), found.scale)
    target = lowrank.stack(terms)
    norm = float(torch.linalg.vector_norm(lowrank.core(target, weights)))
    if plan.method.compress == "none":
        return _relative(lowrank.distance(terms, weights, found), norm)
    # The best truncation W of T is the part of T in W's own column space, and no other column
    # space of its size would have lost less.
    lost, apart = lowrank.projection(terms, weights, found)
    unavoidable = torch.linalg.vector_norm(lowrank.singular_values(target, weights)[found.rank :])
    return _relative(max(apart, lost - float(unavoidable)), norm)


def _relative(error: float, norm: float) -> float:
    if norm > 0:
        return error / norm
    return 0.0 if error == 0 else math.inf
