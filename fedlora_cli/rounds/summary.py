"""From a plan and its results to the report: what a person judges the aggregation by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.render.report import (
    AggregateReport,
    ClientRow,
    ModuleRow,
    PartitionRow,
)
from fedlora_cli.rounds.module import ModuleResult
from fedlora_cli.rounds.plan import Plan
from fedlora_cli.rounds.tensors import tensor_names
from fedlora_cli.rounds.warnings import copies, fading, lone_holders, missing_unused
from fedlora_cli.spectrum import energy, energy_ratio
from fedlora_cli.version import __version__
from fedlora_cli.weights import FloatArray


def summarize(
    plan: Plan,
    results: Sequence[ModuleResult],
    rank: int | None,
    digests: Mapping[str, str],
    remarks: Sequence[str],
    output: str,
) -> AggregateReport:
    """The report of one aggregation; without results, of what a dry run knows."""
    cohort = plan.cohort
    shared_rank = cohort.shared_rank
    written = [result.s[:rank] for result in results]
    flexlora = [result.flexlora_s[:rank] for result in results]
    total = sum(energy(result.s) for result in results)
    weights = {result.name: result.weights for result in results} or plan.weights()
    partitions = _partitions(plan, weights, written, rank)
    return AggregateReport(
        method=plan.method.name,
        source=plan.method.source,
        output=output,
        base_model=cohort.facts.base_model,
        shared_rank=shared_rank,
        rank=rank,
        scale=plan.scale,
        dtype=plan.dtype,
        options=plan.options.changed(),
        energy_ratio=_finite(energy_ratio(written, shared_rank)),
        flexlora_energy_ratio=_finite(energy_ratio(flexlora, shared_rank)),
        kept_energy=_ratio(sum(energy(s) for s in written), total),
        clients=_clients(plan, weights, digests),
        partitions=partitions,
        modules=_modules(plan, results, rank),
        tensors=tensor_names(plan),
        warnings=(
            *remarks,
            *plan.warnings,
            *cohort.notes,
            *copies(digests),
            *lone_holders(plan, weights, partitions),
            *fading(plan, weights),
            *missing_unused(plan),
        ),
        version=__version__,
    )


def _clients(
    plan: Plan, weights: Mapping[str, FloatArray], digests: Mapping[str, str]
) -> tuple[ClientRow, ...]:
    rows = []
    for k, client in enumerate(plan.cohort.clients):
        own = [weights[name][k] for name in client.adapter.modules]
        rows.append(
            ClientRow(
                name=client.name,
                path=str(client.adapter.path),
                rank=client.adapter.rank,
                samples=_whole(client.samples),
                weight=_finite(float(np.mean([w[0] for w in own]))),
                max_weight=_finite(float(np.max([w.max() for w in own]))),
                sha256=digests.get(client.name),
            )
        )
    return tuple(rows)


def _modules(
    plan: Plan, results: Sequence[ModuleResult], rank: int | None
) -> tuple[ModuleRow, ...]:
    known = {result.name: result for result in results}
    rows = []
    for name in plan.modules:
        s = known[name].s if name in known else np.zeros(0)
        written = s[:rank]
        rows.append(
            ModuleRow(
                name=name,
                shape=plan.shape(name),
                ranks=tuple(int(r) for r in plan.cohort.ranks(name)),
                rank=written.size,
                energy_ratio=_finite(energy_ratio([written], plan.cohort.shared_rank)),
                kept_energy=_ratio(energy(written), energy(s)),
                singular_values=tuple(float(value) for value in written),
            )
        )
    return tuple(rows)


def _partitions(
    plan: Plan,
    weights: Mapping[str, FloatArray],
    written: Sequence[FloatArray],
    rank: int | None,
) -> tuple[PartitionRow, ...]:
    """The rank indices from one rank that occurs to the next, and what the output has beyond."""
    cohort = plan.cohort
    bounds = list(cohort.distinct_ranks)
    if rank is not None and rank > bounds[-1]:
        bounds.append(rank)
    total = sum(energy(s) for s in written)
    samples = cohort.samples
    ranks = np.array([client.adapter.rank for client in cohort.clients])
    rows = []
    for first, last in zip([0, *bounds], bounds, strict=False):
        weight, heaviest = _heaviest(plan, weights, first, last)
        rows.append(
            PartitionRow(
                first=first + 1,
                last=last,
                holders=int((ranks >= last).sum()),
                coverage=float(samples[ranks >= last].sum() / samples.sum()),
                energy=_ratio(sum(energy(s[first:last]) for s in written), total),
                max_weight=weight,
                heaviest=heaviest,
            )
        )
    return tuple(rows)


def _heaviest(
    plan: Plan, weights: Mapping[str, FloatArray], first: int, last: int
) -> tuple[float | None, str | None]:
    """The largest weight of one client in a partition of any module, and whose it is."""
    parts = [one[:, first:last] for one in weights.values()]
    tops = [(float(part.max()), int(part.max(axis=1).argmax())) for part in parts if part.size]
    weight, position = max(tops, key=lambda top: top[0], default=(float("nan"), 0))
    return (weight, plan.cohort.names[position]) if np.isfinite(weight) else (None, None)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _whole(value: float) -> float:
    """A sample count as the whole number that it nearly always is."""
    return int(value) if value.is_integer() else value
