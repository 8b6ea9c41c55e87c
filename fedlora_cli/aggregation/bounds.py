"""Bounds computed from the updates: the clip of each norm, and the trust in each client.

Both read every update once, before the first module is aggregated.
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
    bounded_trust,
    clip_factors,
    clip_limit,
    geometric_median,
    multi_krum,
)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Squared reaches (K,) of the updates, and distances between clients for a robust rule.

    Of one module, or of several: `+` sums over modules.
    """

    energies: FloatArray
    comparison: Comparison | None

    def __add__(self, other: _Measured) -> _Measured:
        comparison = None
        if self.comparison is not None and other.comparison is not None:
            comparison = self.comparison + other.comparison
        return _Measured(self.energies + other.energies, comparison)


def is_bounded(plan: Plan) -> bool:
    """Whether the plan needs bounds that are computed from the updates."""
    return plan.options.clip_norm is not None or plan.options.robust is not None


def bounded(plan: Plan, executor: Workers | int, progress: engine.Progress) -> Plan:
    """The plan with every client's clip and trust. Raises InputError.

    `executor` is that of `engine.run`.
    """
    clients = [client.adapter for client in plan.cohort.clients]
    biases = [(name,) for name in _biases(plan)]
    parts = PlanParts(plan, [*grouped(clients, plan.cohort.modules), *biases])
    measure = partial(_measure, plan.cohort.distinct_ranks)
    # Summed as they arrive: all modules' matrices of pairs of clients would not fit into memory.
    total = reduce(add, engine.run(measure, parts, executor, progress))
    norms = np.sqrt(total.energies)
    clip = np.ones_like(norms)
    if plan.options.clip_norm is not None:
        limit = plan.options.clip_norm
        clip = clip_factors(norms, clip_limit(norms) if limit == "auto" else limit)
    return replace(plan, clip=clip, trust=_trust(plan, total.comparison, norms), norms=norms)


def _biases(plan: Plan) -> list[str]:
    """The names of the biases on lora_B, which are updates too."""
    adapters = [client.adapter for client in plan.cohort.clients]
    return sorted({n for a in adapters for n, t in a.tensors.items() if t.role == "lora_bias"})


def _updates(plan: Plan, k: int, names: Sequence[str]) -> dict[str, Factors]:
    """Client k's updates of modules and of biases, which are (out, 1). Raises InputError."""
    updates = client_factors(plan, k, names)
    tensors = plan.cohort.clients[k].adapter.tensors
    for name in names:
        if name in tensors:
            bias = tensors[name].read().to(plan.options.device)[:, None]
            A = torch.ones(1, 1, dtype=bias.dtype, device=bias.device)
            updates[name] = Factors(bias, A, tensors[name].scale or 1)
    return updates


def _measure(distinct_ranks: tuple[int, ...], part: tuple[Plan, Sequence[str]]) -> _Measured:
    """The sum over modules or biases; `distinct_ranks` are those of the whole cohort."""
    plan, names = part
    clients = [_updates(plan, k, names) for k in range(len(plan.cohort.clients))]
    # `pop` frees the memory of a measured module.
    measured = (
        _measured(plan, name, [updates.pop(name, None) for updates in clients], distinct_ranks)
        for name in names
    )
    return reduce(add, measured)


def _measured(
    plan: Plan, name: str, updates: Sequence[Factors | None], distinct_ranks: tuple[int, ...]
) -> _Measured:
    present = {k: update for k, update in enumerate(updates) if update is not None}
    reach = np.zeros(len(updates))
    measured = checked(plan, name, [*present], [*present.values()], torch.float64)
    reach[[*present]] = [sizes.reach for sizes in measured]
    wanted = plan.options.robust is not None
    return _Measured(reach**2, compare(updates, distinct_ranks) if wanted else None)


def _trust(plan: Plan, total: Comparison | None, norms: FloatArray) -> FloatArray:
    """The trust (K,) by which samples are multiplied; 1 without a robust rule."""
    samples = plan.cohort.samples
    if total is None:
        return np.ones_like(samples)
    distances = relative(total)
    if plan.options.robust == "geometric-median":
        trust = geometric_median(distances, samples)
    else:
        trust = multi_krum(distances, samples, plan.options.attackers or 0)
    trust = bounded_trust(trust, norms)
    if not (trust * samples).any():
        found = f"--robust {plan.options.robust} leaves out every client that has samples"
        raise InputError("samples", found, "give fewer --attackers, or other sample counts")
    return trust
