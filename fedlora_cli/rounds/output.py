"""Writing the global adapter, module by module as the modules are computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
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
from fedlora_cli.remote import Location
from fedlora_cli.reports.provenance import check_report
from fedlora_cli.rounds.summary import whole
from fedlora_cli.rounds.tensors import average_tensor, modules_to_save, tensor_like, tensor_names
from fedlora_cli.version import __version__

#: Largest size in bytes of the clients' names and digests in the header of the weights file. The
#: report contains them in any case.
_MOST_METADATA = 4 * 1024 * 1024

#: Sizes in a report: bytes of a number; bytes and values of a row (a module, a client, a range of
#: rank indices) without its lists; the rest of the report, in rows.
_NUMBER, _FIELDS, _VALUES, _OTHERS = 26, 400, 12, 10


def write_adapter(
    folder: Location,
    plan: Plan,
    digests: Mapping[str, str],
    workers: Workers,
    progress: engine.Progress,
) -> list[Outcome]:
    """Write each module into the folder as soon as it is computed; no module stays in memory.

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
                # Most modules have equal weights, which are large with many clients.
                shared = weights.setdefault(outcome.weights.tobytes(), outcome.weights)
                outcomes.append(replace(outcome, weights=shared))
            progress(len(outcomes), len(plan.modules))
        for name in described.tensors:
            put(name, average_tensor(plan, name))
    return outcomes


def _described(plan: Plan) -> NewAdapter:
    """The adapter to write, without values."""
    rank = plan.rank or 0
    return NewAdapter(
        factors={name: described(plan.shape(name), rank, plan.dtype) for name in plan.modules},
        alphas=dict.fromkeys(plan.modules, plan.scale * rank),
        layouts={name: plan.layout(name) for name in plan.modules},
        tensors={name: tensor_like(plan, name) for name in tensor_names(plan)},
        modules_to_save=modules_to_save(plan),
        metadata=replace(
            plan.cohort.metadata.named_like([adapter.metadata for adapter in plan.adapters]),
            tied=common_ties(plan.adapters),
        ),
    )


def _provenance(plan: Plan, digests: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of the weights file, which may travel without the report."""
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
        **({"distribution": plan.method.distribution} if plan.method.distribution else {}),
        "options": {flag: str(value) for flag, value in plan.options.changed().items()},
        "shared_rank": plan.cohort.shared_rank,
        "clients": clients if len(json.dumps(clients)) <= _MOST_METADATA else len(clients),
    }


def check_readable(plan: Plan, remarks: Iterable[str]) -> None:
    """Raise OutputError if the adapter or its report would be too large to be read.

    `remarks` are those in the report.
    """
    digests = dict.fromkeys(plan.cohort.names, "0" * 64)
    ranked = replace(plan, rank=plan.rank or 1)  # unknown until --energy has chosen it
    formats.FORMATS[plan.cohort.format].check_new(_described(ranked), _provenance(plan, digests))
    clients, modules = plan.cohort.clients, plan.modules
    # A module has at most as many singular values as its rank; so has a client energies.
    spectra = sum(min(plan.rank or 0, *plan.shape(name)) for name in modules)
    spectra += sum(client.adapter.rank for client in clients)
    ranks = len(modules) * len(clients)
    longest = len(str(plan.cohort.rank)) + len(", ")
    names = [*modules, *remarks, *(client.name for client in clients)]
    paths = [str(client.adapter.path.resolve()) for client in clients]
    text = sum(len(json.dumps(text)) for text in (*names, *paths))
    rows = len(modules) + len(clients) + len(plan.cohort.distinct_ranks) + _OTHERS
    size = text + _FIELDS * rows + _NUMBER * spectra + longest * ranks
    check_report(size, spectra + ranks + _VALUES * rows)


def written_bytes(plan: Plan) -> int:
    """The bytes of all factors and full tensors; 0 while the rank is unknown."""
    if plan.rank is None:
        return 0
    earlier = [] if plan.previous is None else [plan.previous]
    adapters = [*earlier, *(client.adapter for client in plan.cohort.clients)]
    full = {name: one for adapter in adapters for name, one in adapter.tensors.items()}
    sides = sum(sum(plan.shape(name)) for name in plan.modules)
    factors = stored_bytes((plan.rank, sides), plan.dtype)
    return factors + sum(stored_bytes(one.shape, one.dtype) for one in full.values())
