"""Who decides what at each rank index: holders, coverage, and the weight of single clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.methods.weights import FloatArray

#: The share of all weights at a rank index from which on a client decides it by itself.
OWNED = 0.9


@dataclass(frozen=True)
class Partition:
    """Rank indices first..last, counted from 1, between two ranks that occur among the clients.

    `holders` counts the clients that hold all of it somewhere, `coverage` is their share of the
    samples, `max_weight` the largest weight of one client in it in any module, `heaviest` that
    client. None where the weights depend on norms that nobody has read.
    """

    first: int
    last: int
    holders: int
    coverage: float
    max_weight: float | None
    heaviest: str | None


@dataclass(frozen=True)
class Lone:
    """A client's largest weight where it decides by itself, in how many modules it does, and
    whether it is the only one there in any of them.
    """

    weight: float
    modules: int
    alone: bool


def partitions(
    plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]
) -> tuple[Partition, ...]:
    """The partitions with these upper bounds, ascending, under `weights` (K, R) by module."""
    samples = plan.cohort.samples
    ranks = np.array([client.adapter.rank for client in plan.cohort.clients])
    rows = []
    for first, last in zip([0, *bounds], bounds, strict=False):
        weight, heaviest = _heaviest(plan, weights, first, last)
        rows.append(
            Partition(
                first=first + 1,
                last=last,
                holders=int((ranks >= last).sum()),
                coverage=float(samples[ranks >= last].sum() / samples.sum()),
                max_weight=weight,
                heaviest=heaviest,
            )
        )
    return tuple(rows)


def lone_holders(
    plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]
) -> dict[tuple[int, int, int], Lone]:
    """Partitions that one client owns, all of them but for OWNED, beyond its share of the samples.

    Keys are (first, last, client), first and last counted from 1. Empty where one client has all
    samples.
    """
    shares = plan.cohort.samples / plan.cohort.samples.sum()
    if (shares > 0).sum() < 2:
        return {}
    found = {}
    for first, last in zip([0, *bounds], bounds, strict=False):
        parts = [one[:, first:last] for one in weights.values()]
        # By module, the weight that each client has where others have next to none: (modules, K).
        owned = np.array([_top(part, part >= OWNED * part.sum(axis=0)) for part in parts])
        alone = np.array([_top(part, (part > 0).sum(axis=0) == 1) for part in parts])
        for k in np.flatnonzero((owned > shares).any(axis=0)):
            modules = int((owned[:, k] > shares[k]).sum())
            entirely = bool((alone[:, k] > shares[k]).any())
            found[first + 1, last, int(k)] = Lone(float(owned[:, k].max()), modules, entirely)
    return found


def _top(part: FloatArray, where: npt.NDArray[np.bool_]) -> FloatArray:
    """The largest weight of each client at these rank indices of one module. Shape (K,)."""
    largest: FloatArray = (part * where).max(axis=1, initial=0.0)
    return largest


def _heaviest(
    plan: Plan, weights: Mapping[str, FloatArray], first: int, last: int
) -> tuple[float | None, str | None]:
    """The largest weight of one client in a partition of any module, and whose it is."""
    parts = [one[:, first:last] for one in weights.values()]
    tops = [(float(part.max()), int(part.max(axis=1).argmax())) for part in parts if part.size]
    weight, position = max(tops, key=lambda top: top[0], default=(float("nan"), 0))
    return (weight, plan.cohort.names[position]) if np.isfinite(weight) else (None, None)
