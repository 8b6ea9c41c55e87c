"""Bounds that depend on the updates themselves: the clip of a norm, and the trust in a client.

Both need every update once before the first module can be aggregated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add

import numpy as np
import torch

from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.plan import Plan, PlanParts
from fedlora_cli.aggregation.reading import checked, client_factors
from fedlora_cli.errors import InputError
from fedlora_cli.execution import engine
from fedlora_cli.execution.cluster import Workers
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.robust.distances import Comparison, compare, relative
from fedlora_cli.robust.trust import (
    clip_factors,
    clip_limit,
    geometric_median,
    held_back,
    multi_krum,
)


@dataclass(frozen=True, eq=False)
class _Look:
    """One module: the squares (K,) of how far updates reach, and the distances between clients if
    wanted.
    """

    energies: FloatArray
    comparison: Comparison | None

    def __add__(self, other: _Look) -> _Look:
        if self.comparison is None or other.comparison is None:
            return _Look(self.energies + other.energies, None)
        return _Look(self.energies + other.energies, self.comparison + other.comparison)


def is_bounded(plan: Plan) -> bool:
    """Whether updates must be looked at before they are aggregated."""
    return plan.options.clip_norm is not None or plan.options.robust is not None


def bounded(plan: Plan, executor: Workers | int, progress: engine.Progress) -> Plan:
    """The plan with every client's clip and trust; `executor` as in `engine.run`.

    Raises InputError.
    """
    clients = [client.adapter for client in plan.cohort.clients]
    biases = [(name,) for name in _biases(plan)]
    parts = PlanParts(plan, [*grouped(clients, plan.cohort.modules), *biases])
    look = partial(_look, plan.cohort.distinct_ranks)
    # Summed as they come: matrices of all pairs of clients for every module would not fit.
    total = reduce(add, engine.run(look, parts, executor, progress))
    norms = np.sqrt(total.energies)
    clip = np.ones_like(norms)
    if plan.options.clip_norm is not None:
        limit = plan.options.clip_norm
        clip = clip_factors(norms, clip_limit(norms) if limit == "auto" else limit)
    return replace(plan, clip=clip, trust=_trust(plan, total.comparison, norms), norms=norms)


def _biases(plan: Plan) -> list[str]:
    """The biases on lora_B, which are updates too."""
    adapters = [client.adapter for client in plan.cohort.clients]
    return sorted({n for a in adapters for n, one in a.tensors.items() if one.role == "lora_bias"})


def _updates(plan: Plan, k: int, names: Sequence[str]) -> dict[str, Factors]:
    """What client k changes in modules, or by biases: (out, 1), of rank 1. Raises InputError."""
    found = client_factors(plan, k, names)
    tensors = plan.cohort.clients[k].adapter.tensors
    for name in names:
        if name in tensors:
            bias = tensors[name].read().to(plan.options.device)[:, None]
            one = torch.ones(1, 1, dtype=bias.dtype, device=bias.device)
            found[name] = Factors(bias, one, tensors[name].scale or 1)
    return found


def _look(distinct_ranks: tuple[int, ...], part: tuple[Plan, Sequence[str]]) -> _Look:
    """The sum over modules or biases; the ranks are those of the whole cohort."""
    plan, names = part
    own = [_updates(plan, k, names) for k in range(len(plan.cohort.clients))]
    looks = (
        _look_at(plan, name, [one.pop(name, None) for one in own], distinct_ranks) for name in names
    )
    return reduce(add, looks)


def _look_at(
    plan: Plan, name: str, updates: Sequence[Factors | None], distinct_ranks: tuple[int, ...]
) -> _Look:
    held = {k: one for k, one in enumerate(updates) if one is not None}
    reach = np.zeros(len(updates))
    found = checked(plan, name, [*held], [*held.values()], torch.float64)
    reach[[*held]] = [one.reach for one in found]
    wanted = plan.options.robust is not None
    return _Look(reach**2, compare(updates, distinct_ranks) if wanted else None)


def _trust(plan: Plan, total: Comparison | None, norms: FloatArray) -> FloatArray:
    """Multipliers (K,) for the samples; 1 without a robust rule."""
    samples = plan.cohort.samples
    if total is None:
        return np.ones_like(samples)
    distances = relative(total)
    if plan.options.robust == "geometric-median":
        trust = geometric_median(distances, samples)
    else:
        trust = multi_krum(distances, samples, plan.options.attackers or 0)
    trust = held_back(trust, norms)
    if not (trust * samples).any():
        found = f"every client with samples is left out by --robust {plan.options.robust}"
        raise InputError("samples", found, "give fewer --attackers, or other sample counts")
    return trust
