"""The influence of clients on each rank index: holders, coverage, and largest weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.methods.weights import FloatArray

#: Share of the weights at a rank index from which on a client decides it alone.
OWNED = 0.9


@dataclass(frozen=True)
class Partition:
    """Rank indices first..last, counted from 1, between two neighboring ranks of the clients.

    - `holders`: number of clients whose rank reaches `last`; `coverage`: their share of samples.
    - `max_weight`: the largest weight of a client in any module, and `heaviest` that client; None
      if the weights depend on norms that have not been computed.
    """

    first: int
    last: int
    holders: int
    coverage: float
    max_weight: float | None
    heaviest: str | None


@dataclass(frozen=True)
class Lone:
    """A client that decides rank indices alone: its largest weight there, and in how many modules.

    `alone` if it is the only client with a weight there, in any module.
    """

    weight: float
    modules: int
    alone: bool


def partitions(
    plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]
) -> tuple[Partition, ...]:
    """The partitions with these upper bounds (ascending), under `weights` (K, R) by module."""
    samples = plan.cohort.samples
    ranks = np.array([client.adapter.rank for client in plan.cohort.clients])
    return tuple(
        Partition(
            first + 1,
            last,
            int((ranks >= last).sum()),
            float(samples[ranks >= last].sum() / samples.sum()),
            *_heaviest(plan, weights, first, last),
        )
        for first, last in pairwise([0, *bounds])
    )


def lone_holders(
    plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]
) -> dict[tuple[int, int, int], Lone]:
    """Partitions in which a client has more weight than its share of samples, and at least OWNED
    of all weights.

    Keys are (first, last, client); first and last count from 1. Empty if a client has all samples.
    """
    shares = plan.cohort.samples / plan.cohort.samples.sum()
    if (shares > 0).sum() < 2:
        return {}
    lone = {}
    for first, last in pairwise([0, *bounds]):
        parts = [module[:, first:last] for module in weights.values()]
        # (modules, K): each client's largest weight at rank indices that it decides alone.
        owned = np.array([_top(part, part >= OWNED * part.sum(axis=0)) for part in parts])
        alone = np.array([_top(part, (part > 0).sum(axis=0) == 1) for part in parts])
        for k in np.flatnonzero((owned > shares).any(axis=0)):
            modules = int((owned[:, k] > shares[k]).sum())
            entirely = bool((alone[:, k] > shares[k]).any())
            lone[first + 1, last, int(k)] = Lone(float(owned[:, k].max()), modules, entirely)
    return lone


def _top(part: FloatArray, where: npt.NDArray[np.bool_]) -> FloatArray:
    """The largest weight of each client at the rank indices `where`, in one module. Shape (K,)."""
    largest: FloatArray = (part * where).max(axis=1, initial=0.0)
    return largest


def _heaviest(
    plan: Plan, weights: Mapping[str, FloatArray], first: int, last: int
) -> tuple[float | None, str | None]:
    """The largest weight of a client in a partition of any module, and the client's name."""
    parts = [module[:, first:last] for module in weights.values()]
    tops = [(float(part.max()), int(part.max(axis=1).argmax())) for part in parts if part.size]
    weight, position = max(tops, key=lambda top: top[0], default=(float("nan"), 0))
    return (weight, plan.cohort.names[position]) if np.isfinite(weight) else (None, None)
