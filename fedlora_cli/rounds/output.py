"""The global adapter, written module by module as the modules are computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import NewAdapter, common_ties
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.module import Outcome, aggregate_part
from fedlora_cli.aggregation.plan import Plan, PlanParts
from fedlora_cli.execution import engine
from fedlora_cli.execution.workers import Workers
from fedlora_cli.linalg.casting import described, stored_bytes
from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.reports.provenance import check_report
from fedlora_cli.rounds.summary import whole
from fedlora_cli.rounds.tensors import average_tensor, modules_to_save, tensor_like, tensor_names
from fedlora_cli.version import __version__

#: Bytes of the clients' names and digests in the metadata of the weights, which count against the
#: length of its header. The report has them in any case.
_MOST_METADATA = 4 * 1024 * 1024

#: In a report, the bytes of one number, and the bytes and values of a module, a client or a range
#: of rank indices without their lists; all else in it takes what so many of these take.
_NUMBER, _FIELDS, _VALUES, _OTHERS = 26, 400, 12, 10


def write_adapter(
    folder: Path,
    plan: Plan,
    digests: Mapping[str, str],
    workers: Workers,
    progress: engine.Progress,
) -> list[Outcome]:
    """The adapter in the folder, every module as soon as it is computed; none is kept.

    Raises InputError and OSError.
    """
    described = _described(plan)
    chosen = formats.FORMATS[plan.cohort.format]
    outcomes: list[Outcome] = []
    weights: dict[bytes, FloatArray] = {}
    with chosen.writing(described, folder, _provenance(plan, digests)) as put:
        groups = grouped(plan.adapters, plan.modules)
        for part in engine.run(aggregate_part, PlanParts(plan, groups), workers):
            for factors, outcome in part:
                put(outcome.name, factors)
                # Most modules have the same weights, which are large where clients are many.
                alike = weights.setdefault(outcome.weights.tobytes(), outcome.weights)
                outcomes.append(replace(outcome, weights=alike))
            progress(len(outcomes), len(plan.modules))
        for name in described.tensors:
            put(name, average_tensor(plan, name))
    return outcomes


def _described(plan: Plan) -> NewAdapter:
    """What will be written, without any values."""
    rank = plan.rank or 0
    return NewAdapter(
        factors={name: described(plan.shape(name), rank, plan.dtype) for name in plan.modules},
        alphas=dict.fromkeys(plan.modules, plan.scale * rank),
        layouts={name: plan.layout(name) for name in plan.modules},
        tensors={name: tensor_like(plan, name) for name in tensor_names(plan)},
        modules_to_save=modules_to_save(plan),
        facts=replace(
            plan.cohort.facts.named_like([adapter.facts for adapter in plan.adapters]),
            tied=common_ties(plan.adapters),
        ),
    )


def _provenance(plan: Plan, digests: Mapping[str, str]) -> dict[str, Any]:
    """What the weights file itself remembers, when it travels alone."""
    clients = [
        {
            "name": client.name,
            "rank": client.adapter.rank,
            "samples": whole(client.samples),
            "sha256": digests.get(client.name),
        }
        for client in plan.cohort.clients
    ]
    return {
        "version": __version__,
        "method": plan.method.name,
        "source": plan.method.source,
        "options": {flag: str(value) for flag, value in plan.options.changed().items()},
        "shared_rank": plan.cohort.shared_rank,
        "clients": clients if len(json.dumps(clients)) <= _MOST_METADATA else len(clients),
    }


def check_readable(plan: Plan, said: Iterable[str]) -> None:
    """Whether the adapter and its report will be small enough for what reads them; `said` are the
    remarks in the report. Raises OutputError, before any work.
    """
    digests = dict.fromkeys(plan.cohort.names, "0" * 64)
    some = replace(plan, rank=plan.rank or 1)  # while --energy has still to decide it
    formats.FORMATS[plan.cohort.format].check_new(_described(some), _provenance(plan, digests))
    clients, modules = plan.cohort.clients, plan.modules
    # No module has more singular values than its rank, nor a client more energies.
    spectra = sum(min(plan.rank or 0, *plan.shape(name)) for name in modules)
    spectra += sum(client.adapter.rank for client in clients)
    ranks = len(modules) * len(clients)
    longest = len(str(plan.cohort.rank)) + len(", ")
    names = [*modules, *said, *(client.name for client in clients)]
    paths = [str(client.adapter.path.resolve()) for client in clients]
    text = sum(len(json.dumps(one)) for one in (*names, *paths))
    rows = len(modules) + len(clients) + len(plan.cohort.distinct_ranks) + _OTHERS
    size = text + _FIELDS * rows + _NUMBER * spectra + longest * ranks
    check_report(size, spectra + ranks + _VALUES * rows)


def written_bytes(plan: Plan) -> int:
    """The bytes of all factors and full tensors; 0 while the rank is not known."""
    if plan.rank is None:
        return 0
    earlier = [] if plan.previous is None else [plan.previous]
    adapters = [*earlier, *(client.adapter for client in plan.cohort.clients)]
    full = {name: one for adapter in adapters for name, one in adapter.tensors.items()}
    sides = sum(sum(plan.shape(name)) for name in plan.modules)
    factors = stored_bytes((plan.rank, sides), plan.dtype)
    return factors + sum(stored_bytes(one.shape, one.dtype) for one in full.values())
