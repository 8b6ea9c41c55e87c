"""Estimates of an aggregation: memory, bytes, and the route of every module."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora_cli.adapters.batches import grouped, module_bytes
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.aggregation.routes import route_of
from fedlora_cli.reports.aggregate import RouteRow, WorkEstimate
from fedlora_cli.rounds.output import written_bytes

#: Memory of a process with torch and the headers of a few clients (measured: 290 MB).
_PROCESS = 300_000_000

#: Memory of a tensor's header (measured over 1000 clients of two layers).
_ENTRY = 1_500

#: Bytes of a number of an update (out, in) in a function of a method from outside, which may form
#: it: ten matrices in float64, as the merge of samples/plugin.
_FORMED = 10 * 8

#: Bytes by number to compare clients in float64: singular vectors, of each client and side by side;
#: a strip of Gram matrices with its selection; eight temporary matrices of all pairs for each
#: level; and three final ones.
_SVDS = 2 * 8
_STRIP = 5 * 8
_LEVEL = 8 * 8
_COMPARISON = 3 * 8

#: Bytes of a number of a full tensor: the sum and the tensor that is read are both float64.
_AVERAGED = 8


def estimate_work(plan: Plan, jobs: int) -> WorkEstimate:
    """The estimate for this plan with `jobs` modules at a time; on a cluster, of one worker."""
    if plan.options.cluster is not None:
        jobs = 1
    adapters = plan.adapters
    groups = grouped(adapters, plan.modules)
    largest = max((_group_bytes(plan, names) for names in groups), default=0)
    tensors = [one for adapter in adapters for one in adapter.tensors.values()]
    full = max((2 * _AVERAGED * math.prod(one.shape) for one in tensors), default=0)
    entries = sum(2 * len(one.modules) + len(one.tensors) for one in adapters)
    compared = jobs * max((_compared_bytes(plan, names) for names in groups), default=0)
    return WorkEstimate(
        memory=_PROCESS + _ENTRY * entries + max(jobs * largest, full, compared),
        read=sum(module_bytes(adapters, name) for name in plan.modules),
        write=None if plan.rank is None else written_bytes(plan),
        jobs=jobs,
        routes=_routes(plan) if plan.method.streams and plan.rank is not None else (),
    )


def _group_bytes(plan: Plan, names: Sequence[str]) -> int:
    """The memory of a group: its factors, and the computation of its largest module."""
    read = sum(module_bytes(plan.adapters, name) for name in names)
    choices = [route_of(plan, name) for name in names]
    # These options allow the QR route alone.
    options = plan.options
    exact = not plan.method.streams or options.verify or options.energy is not None
    chosen = [choice.estimate("qr") if exact else choice.chosen for choice in choices]
    needed = max(one.bytes for one in chosen)
    if len(names) == 1 and chosen[0].route == "dense":
        return needed
    if not plan.method.within_span:
        needed += _FORMED * max(math.prod(plan.shape(name)) for name in names)
    return read + needed


def _compared_bytes(plan: Plan, names: Sequence[str]) -> int:
    """The memory of a group if `--robust` compares all clients: its factors, the matrices of its
    largest module, and the sums of this group and of two waiting groups.
    """
    if plan.options.robust is None:
        return 0
    adapters = [client.adapter for client in plan.cohort.clients]
    pairs = len(adapters) ** 2
    read = sum(module_bytes(adapters, name) for name in names)
    largest = 0
    for name in names:
        ranks = plan.cohort.ranks(name)
        levels = len({*ranks[ranks > 0], plan.cohort.distinct_ranks[-1]})
        directions = int(ranks.sum()) * (sum(plan.shape(name)) * _SVDS + int(ranks.max()) * _STRIP)
        largest = max(largest, directions + levels * pairs * _LEVEL)
    return read + largest + 3 * pairs * _COMPARISON


def _routes(plan: Plan) -> tuple[RouteRow, ...]:
    """One row for modules of equal shape and rank, the most expensive first."""
    alike: dict[tuple[tuple[int, int], int], list[str]] = {}
    for name in plan.modules:
        total = sum(one.modules[name].rank for one in plan.adapters if name in one.modules)
        alike.setdefault((plan.shape(name), total), []).append(name)
    rows = []
    for (shape, total), names in alike.items():
        choice = route_of(plan, names[0])
        rows.append(
            RouteRow(
                modules=len(names),
                shape=shape,
                total_rank=total,
                route=choice.route,
                seconds=len(names) * choice.chosen.seconds,
                bytes=choice.chosen.bytes,
                others={
                    one.route: len(names) * one.seconds if one.possible is None else one.possible
                    for one in choice.estimates
                    if one.route != choice.route
                },
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.seconds, row.shape)))
