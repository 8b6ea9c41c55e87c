"""What ranks and sample counts alone tell of the rounds to come: weights, coverage, decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora_cli.analysis.prediction.advice import advise, bounding_quorum
from fedlora_cli.analysis.prediction.forecast import forecast, start_energies
from fedlora_cli.analysis.prediction.population import DRAWS, Population, absent, alone, population
from fedlora_cli.errors import UsageError
from fedlora_cli.methods import METHODS
from fedlora_cli.methods.method import Method
from fedlora_cli.methods.raflora import with_quorum
from fedlora_cli.methods.weights import Rule
from fedlora_cli.reports.predict import PredictedPartition, PredictReport
from fedlora_cli.version import __version__

if TYPE_CHECKING:  # it reads adapters, and so imports torch
    from fedlora_cli.clients.cohort import Cohort

#: What goes beyond these is a mistake, or takes long.
MOST_CLIENTS = 100_000
MOST_RANK = 4096
MOST_PARTITIONS = 128
MOST_SAMPLES = 1e12

#: What a person would type.
_QUORUMS = [step / 100 for step in range(101)]


def predict(
    ranks: Sequence[int],
    samples: Sequence[float],
    *,
    participation: float = 1.0,
    start: float | None = None,
    quorum: float | None = None,
    warnings: Sequence[str] = (),
) -> PredictReport:
    """The forecast for clients of these ranks and sample counts, in a basis that stays and without
    training.

    Each round has `participation` of the clients, at least one, drawn independently: the expected
    energy of a rank index after t rounds is then the expected factor to the power of t. `start` is
    ρ of round 0, spread evenly within the shared rank and beyond it; without it all rank indices
    have the same energy. `quorum` adds raflora with that quorum. Raises UsageError.
    """
    _check(ranks, samples, participation, start, quorum)
    clients = population(ranks, samples)
    present = max(1, round(participation * clients.clients))
    rounds = clients.rounds(present)
    advised = bounding_quorum({q: with_quorum(q) for q in _QUORUMS}, rounds)
    energies = start_energies(clients, start)
    forecasts = forecast(_rows((advised, quorum)), clients, rounds, energies)
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
        warnings=tuple(warnings),
        version=__version__,
    )


def ranks_of(cohort: Cohort) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The rank of every client, the largest of its modules, and a warning where those differ."""
    ranks = tuple(client.adapter.rank for client in cohort.clients)
    differing = [
        client.name
        for client, rank in zip(cohort.clients, ranks, strict=True)
        if any(module.rank != rank for module in client.adapter.modules.values())
    ]
    if not differing:
        return ranks, ()
    others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return ranks, (
        f"modules of {differing[0]}{others} differ in rank; predicted with the largest of each",
    )


def _rows(quorums: Sequence[float | None]) -> dict[str, tuple[Method, Rule]]:
    """Every method under its name, and raflora with these quorums."""
    owner = METHODS["raflora"]
    plain = {name: (method, method.rule) for name, method in METHODS.items()}
    return plain | {
        f"{owner.name}, quorum {q:g}": (owner, with_quorum(q))
        for q in sorted(q for q in quorums if q)
    }


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


def _check(
    ranks: Sequence[int],
    samples: Sequence[float],
    participation: float,
    start: float | None,
    quorum: float | None,
) -> None:
    count, different = len(ranks), len(set(ranks))
    if not 1 <= count <= MOST_CLIENTS:
        raise UsageError("predict", f"{count} clients", f"give 1 to {MOST_CLIENTS}")
    wrong = [rank for rank in ranks if not 1 <= rank <= MOST_RANK]
    if wrong:
        raise UsageError("--ranks", f"a rank of {wrong[0]}", f"ranks are 1 to {MOST_RANK}")
    if different > MOST_PARTITIONS:
        raise UsageError(
            "--ranks", f"{different} different ranks", f"give {MOST_PARTITIONS} at most"
        )
    if len(samples) != count:
        raise UsageError(
            "--samples", f"{len(samples)} counts for {count} clients", "give each client one"
        )
    wrong_counts = [n for n in samples if not 0 <= n <= MOST_SAMPLES]
    if wrong_counts:
        cure = f"counts are 0 to {MOST_SAMPLES:g}"
        raise UsageError("--samples", f"a count of {wrong_counts[0]:g}", cure)
    if not any(samples):
        raise UsageError("--samples", "all counts are zero", "give at least one client samples")
    if not 0 < participation <= 1:
        raise UsageError("--participation", f"{participation} is out of range", "give it in (0, 1]")
    if start is not None and not 0 < start < 1:
        raise UsageError("--start", f"{start} is out of range", "it must be in (0, 1)")
    if quorum is not None and not 0 <= quorum <= 1:
        raise UsageError("--quorum", f"{quorum} is out of range", "it must be in [0, 1]")
