"""The forecast of future rounds from ranks and sample counts: weights, coverage, decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedlora_cli.analysis.decay import is_predictable
from fedlora_cli.analysis.prediction.advice import advise, bounding_quorum
from fedlora_cli.analysis.prediction.forecast import forecast, start_energies
from fedlora_cli.analysis.prediction.options import (
    MOST_CLIENTS,
    MOST_PARTITIONS,
    MOST_RANK,
    MOST_SAMPLES,
    PredictOptions,
)
from fedlora_cli.analysis.prediction.population import DRAWS, Population, absent, alone, population
from fedlora_cli.errors import UsageError
from fedlora_cli.methods import METHODS, listing
from fedlora_cli.methods.method import Method
from fedlora_cli.methods.raflora import with_quorum
from fedlora_cli.methods.weights import Rule
from fedlora_cli.reports.predict import PredictedPartition, PredictReport
from fedlora_cli.text import shortened
from fedlora_cli.version import __version__

if TYPE_CHECKING:  # this module imports torch
    from fedlora_cli.clients.cohort import Cohort

DEFAULTS = PredictOptions()

#: The quorums that are tried: two decimals.
_QUORUMS = [step / 100 for step in range(101)]


def predict(
    ranks: Sequence[int],
    samples: Sequence[float],
    options: PredictOptions = DEFAULTS,
    warnings: Sequence[str] = (),
) -> PredictReport:
    """The forecast for clients with these ranks and sample counts, in a fixed basis and without
    training.

    The clients of each round are drawn independently: the expected energy of a rank index after t
    rounds is the expected factor to the power of t. Raises UsageError.
    """
    participation = options.participation
    _check(ranks, samples)
    clients = population(ranks, samples)
    present = max(1, round(participation * clients.clients))
    rounds = clients.rounds(present)
    advised = bounding_quorum({q: with_quorum(q) for q in _QUORUMS}, rounds)
    energies = start_energies(clients, options.start)
    methods, broken = listing()
    able = {name: method for name, method in methods.items() if is_predictable(method)}
    rows = _rows(able, (advised, options.quorum))
    forecasts = forecast(rows, clients, rounds, energies, options.rounds)
    partitions = _partitions(clients, present)
    return PredictReport(
        ranks=tuple(ranks),
        samples=tuple(samples),
        shared_rank=partitions[0].last,
        participation=participation,
        present=present,
        draws=DRAWS if clients.sampled(present) else 0,
        start=float(energies[0] / energies.sum()),
        coverage=clients.by_index(clients.coverage),
        partitions=partitions,
        methods=tuple(forecasts.values()),
        advice=advise(partitions, forecasts, advised, partial=present < clients.clients),
        warnings=(
            *warnings,
            *(
                f"{method.title} has no forecast: its merge is a function"
                for name, method in methods.items()
                if name not in able
            ),
            *map(str, broken.values()),
        ),
        version=__version__,
        rounds=options.rounds,
    )


def ranks_of(cohort: Cohort) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The largest rank of every client, and a warning if the ranks of its modules differ."""
    ranks = tuple(client.adapter.rank for client in cohort.clients)
    differing = [
        client.name
        for client, rank in zip(cohort.clients, ranks, strict=True)
        if any(module.rank != rank for module in client.adapter.modules.values())
    ]
    if not differing:
        return ranks, ()
    names = shortened(differing, 1)
    return ranks, (f"modules of {names} differ in rank; the forecast takes the largest rank",)


def _rows(
    methods: Mapping[str, Method], quorums: Sequence[float | None]
) -> dict[str, tuple[Method, Rule]]:
    """Every method by its name, and raflora with these quorums."""
    raflora = METHODS["raflora"]
    rows = {name: (method, method.rule) for name, method in methods.items()}
    for quorum in sorted(quorum for quorum in quorums if quorum):
        rows[f"{raflora.name}, quorum {quorum:g}"] = (raflora, with_quorum(quorum))
    return rows


def _partitions(clients: Population, present: int) -> tuple[PredictedPartition, ...]:
    firsts = [1, *(int(bound) + 1 for bound in clients.bounds)]
    return tuple(
        PredictedPartition(
            first=first,
            last=int(last),
            holders=int(holders),
            coverage=float(coverage),
            absent=absent(clients.clients, int(holders), present),
            alone=alone(clients.clients, int(holders), present),
        )
        for first, last, holders, coverage in zip(
            firsts, clients.bounds, clients.holders, clients.coverage, strict=False
        )
    )


def _check(ranks: Sequence[int], samples: Sequence[float]) -> None:
    count, different = len(ranks), len(set(ranks))
    if not 1 <= count <= MOST_CLIENTS:
        raise UsageError("predict", f"{count} clients", f"give 1 to {MOST_CLIENTS}")
    wrong = [rank for rank in ranks if not 1 <= rank <= MOST_RANK]
    if wrong:
        raise UsageError("--ranks", f"a rank of {wrong[0]}", f"ranks are 1 to {MOST_RANK}")
    if different > MOST_PARTITIONS:
        cure = f"give {MOST_PARTITIONS} at most"
        raise UsageError("--ranks", f"{different} different ranks", cure)
    if len(samples) != count:
        found = f"{len(samples)} counts for {count} clients"
        raise UsageError("--samples", found, "give one per client")
    wrong_counts = [n for n in samples if not 0 <= n <= MOST_SAMPLES]
    if wrong_counts:
        cure = f"counts are 0 to {MOST_SAMPLES:g}"
        raise UsageError("--samples", f"a count of {wrong_counts[0]:g}", cure)
    if not any(samples):
        raise UsageError("--samples", "all counts are zero", "give at least one client samples")
