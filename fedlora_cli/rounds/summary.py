"""The report of an aggregation, made from its plan and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.aggregation.influence import partitions
from fedlora_cli.aggregation.module import Outcome
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.clients.reading import LoadedCohort
from fedlora_cli.linalg.spectrum import energy, energy_ratio, pooled_energy
from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.reports.aggregate import AggregateReport, ClientRow, ModuleRow, PartitionRow
from fedlora_cli.rounds.tensors import left_out, lone_heads, other_dtypes, tensor_names
from fedlora_cli.rounds.warnings import copies, fading, lone, missing_unused, outstanding, reduced
from fedlora_cli.version import __version__


def summarize(
    plan: Plan,
    results: Sequence[Outcome],
    rank: int | None,
    digests: Mapping[str, str],
    clients: LoadedCohort,
    remarks: Sequence[str],
    output: str,
) -> AggregateReport:
    """The report of an aggregation; without results, of a dry run."""
    cohort = plan.cohort
    shared_rank = cohort.shared_rank
    written = [result.s for result in results]
    flexlora = [result.flexlora_s for result in results]
    total = sum(result.energy for result in results)
    weights = {result.name: result.weights for result in results} or plan.weights()
    shown = _partitions(plan, weights, written, rank)
    rows = _clients(plan, results, weights, digests)
    return AggregateReport(
        method=plan.method.name,
        source=plan.method.source,
        output=output,
        base_model=cohort.metadata.base_model,
        shared_rank=shared_rank,
        rank=rank,
        scale=plan.scale,
        dtype=plan.dtype,
        options=plan.options.changed(),
        energy_ratio=_finite(energy_ratio(written, shared_rank)),
        flexlora_energy_ratio=_finite(energy_ratio(flexlora, shared_rank)),
        norm=_norm(written) if results else None,
        flexlora_norm=_norm(flexlora) if results else None,
        kept_energy=_ratio(sum(energy(s) for s in written), total),
        samples_from=clients.samples_from,
        clients=rows,
        left_out=clients.left_out,
        partitions=shown,
        modules=_modules(plan, results),
        tensors=tensor_names(plan),
        warnings=(
            *remarks,
            *plan.warnings,
            *cohort.notes,
            *copies(digests),
            *outstanding(rows, plan.options),
            *reduced(rows),
            *lone(plan, weights, [row.last for row in shown]),
            *fading(plan, weights),
            *missing_unused(plan),
            *left_out(plan),
            *lone_heads(plan),
            *other_dtypes(plan),
            *(["the global update is zero in every module"] if results and total == 0 else []),
        ),
        version=__version__,
        format=cohort.format,
        distribution=plan.method.distribution,
    )


def _clients(
    plan: Plan,
    results: Sequence[Outcome],
    weights: Mapping[str, FloatArray],
    digests: Mapping[str, str],
) -> tuple[ClientRow, ...]:
    rows = []
    for k, client in enumerate(plan.cohort.clients):
        own_weights = [weights[name][k] for name in client.adapter.modules]
        rows.append(
            ClientRow(
                name=client.name,
                path=str(client.adapter.path),
                rank=client.adapter.rank,
                samples=whole(client.samples),
                weight=_finite(float(np.mean([w[0] for w in own_weights]))),
                max_weight=_finite(float(np.max([w.max() for w in own_weights]))),
                energy=_client_energy(results, k),
                sha256=digests.get(client.name),
                norm=_at(plan.norms, k) if plan.norms is not None else _own_norm(results, k),
                clip=_at(plan.clip, k),
                trust=_at(plan.trust, k),
            )
        )
    return tuple(rows)


def _own_norm(results: Sequence[Outcome], k: int) -> float | None:
    """‖ΔW_k‖_F over all modules; None without results."""
    if not results:
        return None
    updates = [(one.client_s[k], one.client_sizes[k]) for one in results if k in one.client_s]
    # Sizes are known within 1 % and matter only if parts of an update cancel.
    return float(np.sqrt(sum(max(energy(s), (size.part / 2) ** 2) for s, size in updates)))


def _at(values: FloatArray | None, k: int) -> float | None:
    return None if values is None else float(values[k])


def _modules(plan: Plan, results: Sequence[Outcome]) -> tuple[ModuleRow, ...]:
    known = {result.name: result for result in results}
    rows = []
    for name in plan.modules:
        written = known[name].s if name in known else np.zeros(0)
        whole = known[name].energy if name in known else 0.0
        rows.append(
            ModuleRow(
                name=name,
                shape=plan.shape(name),
                ranks=tuple(int(r) for r in plan.cohort.ranks(name)),
                rank=written.size,
                energy_ratio=_finite(energy_ratio([written], plan.cohort.shared_rank)),
                kept_energy=_ratio(energy(written), whole),
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
    """The ranges of rank indices between the ranks of clients, and those above in the output."""
    bounds = list(plan.cohort.distinct_ranks)
    if rank is not None and rank > bounds[-1]:
        bounds.append(rank)
    total = sum(energy(s) for s in written)
    return tuple(
        PartitionRow(
            first=row.first,
            last=row.last,
            holders=row.holders,
            coverage=row.coverage,
            energy=_ratio(sum(energy(s[row.first - 1 : row.last]) for s in written), total),
            max_weight=row.max_weight,
            heaviest=row.heaviest,
        )
        for row in partitions(plan, weights, bounds)
    )


def _client_energy(results: Sequence[Outcome], k: int) -> tuple[float, ...]:
    """The energy of a client's update by singular direction, pooled over its modules."""
    spectra = [result.client_s[k] for result in results if k in result.client_s]
    return tuple(float(value) for value in pooled_energy(spectra))


def _norm(spectra: Sequence[FloatArray]) -> float:
    """‖ΔW‖_F with all modules as one vector."""
    return float(np.sqrt(sum(energy(s) for s in spectra)))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def whole(value: float) -> float:
    """A sample count as an integer if it is one."""
    return int(value) if value.is_integer() else value
