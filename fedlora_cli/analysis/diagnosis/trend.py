"""ρ over a series of rounds: its decay as measured and as the weights predict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora_cli.analysis.decay import energy_factors
from fedlora_cli.analysis.diagnosis.verdict import kept
from fedlora_cli.linalg.spectrum import FloatArray, mean_share
from fedlora_cli.methods import METHODS
from fedlora_cli.methods.weights import Holdings
from fedlora_cli.reports.diagnose import AdapterRow, Trend
from fedlora_cli.reports.provenance import Contributor, Provenance

#: The fewest rounds from which a rate is fitted: two fit any line.
_FEWEST = 3


@dataclass(frozen=True)
class Course:
    """What became of the energy beyond one rank, by round: its share in the global adapter, its
    share in the updates of the clients that hold more, and κ; and the rate that weights predict.
    """

    rank: int
    beyond: tuple[float | None, ...]
    brought: tuple[float | None, ...]
    kept: tuple[float | None, ...]
    predicted_gamma: float | None


def course(
    rows: Sequence[AdapterRow],
    origins: Sequence[Provenance | None],
    factors: Sequence[FloatArray | None],
    rank: int,
) -> Course:
    """The course beyond that rank of these global adapters, in the order of their rounds.

    Where one of them does not say what its clients brought, the reference of every round is the
    global adapter of the round before, so that κ compares with the first.
    """
    beyond = [_share(row.energy, rank) for row in rows]
    known = [origin for origin in origins if origin is not None]
    if len(known) == len(rows):
        brought = [clients_beyond(origin.clients, rank) for origin in known]
        reference = brought
    else:
        brought = [None] * len(rows)
        reference = [beyond[0], *brought[1:]]
    left = kept(beyond, reference)
    gamma = _predicted_gamma(factors, rank)
    return Course(rank, tuple(beyond), tuple(brought), tuple(left), gamma)


def trend(
    rows: Sequence[AdapterRow],
    factors: Sequence[FloatArray | None],
    shared: Course,
    judged: Course,
) -> Trend:
    """The trend of these rounds: ρ at the shared rank, and κ where it is worst."""
    start, gamma, r_squared = fit([_odds(h) for h in shared.beyond])
    return Trend(
        rounds=len(rows),
        names=tuple(row.name for row in rows),
        energy_ratio=tuple(row.energy_ratio for row in rows),
        clients_energy_ratio=tuple(None if e is None else 1 - e for e in shared.brought),
        judged_rank=judged.rank,
        beyond=judged.beyond,
        clients_beyond=judged.brought,
        kept=judged.kept,
        gamma=gamma,
        r_squared=r_squared,
        fitted_from=start,
        predicted_gamma=shared.predicted_gamma,
        predicted_energy_ratio=tuple(_predicted(rows[0], factors, shared.rank)),
    )


def clients_beyond(clients: Sequence[Contributor], rank: int) -> float | None:
    """The share of energy beyond the rank in the updates of the clients that hold more than it,
    averaged by samples. None if nobody does, or none of them has any energy.
    """
    holders = [client for client in clients if client.rank > rank]
    return mean_share([c.energy for c in holders], [c.samples for c in holders], rank, None)


def fit(values: Sequence[float | None]) -> tuple[int | None, float | None, float | None]:
    """The factor per round of a geometric series: where the fit begins (from 1), γ and r².

    Least squares of ln value over the round, on the later half of those that are positive and at
    least three of them: by then the slowest partition is what is left. Without three of them, None.

    >>> [round(x, 12) for x in fit([1.0, 0.5, 0.25, 0.125])]
    [2, 0.5, 1.0]
    """
    rounds = np.array([t for t, value in enumerate(values) if value is not None and value > 0])
    rounds = rounds[-max(_FEWEST, -(-len(rounds) // 2)) :]
    if len(rounds) < _FEWEST:
        return None, None, None
    y = np.log([values[t] for t in rounds])
    slope, intercept = np.polyfit(rounds, y, 1)
    residual = float(np.square(y - (slope * rounds + intercept)).sum())
    spread = float(np.square(y - y.mean()).sum())
    # A constant has nothing to explain.
    varies = spread > len(rounds) * np.finfo(np.float64).eps
    r_squared = 1 - residual / spread if varies else None
    return int(rounds[0]) + 1, float(np.exp(slope)), r_squared


def _share(energy: Sequence[float], rank: int) -> float | None:
    """The share of energy beyond the rank, None where there is none at all."""
    total = sum(energy)
    return sum(energy[rank:]) / total if total > 0 else None


def _odds(beyond: float | None) -> float | None:
    """h / (1 - h): the energy beyond the shared rank relative to that within it.

    Weights that leave the shared rank alone multiply this by exactly γ a round; for ρ near 1 it is
    1 - ρ itself.
    """
    return None if beyond is None or beyond >= 1 else beyond / (1 - beyond)


def energy_factors_by_round(
    rows: Sequence[AdapterRow], origins: Sequence[Provenance | None]
) -> list[FloatArray | None]:
    """What the weights of each round did to the energy of each rank index; None if unknown."""
    earlier = [rows[0], *rows]
    return [
        _factors(before.rank, row.rank, origin)
        for before, row, origin in zip(earlier, rows, origins, strict=False)
    ]


def _factors(previous_rank: int, rank: int, origin: Provenance | None) -> FloatArray | None:
    # Momentum depends on two rounds; where ranks differ by module, so do the weights.
    if origin is None or origin.method not in METHODS or origin.momentum or not origin.uniform:
        return None
    method = METHODS[origin.method]
    holdings = Holdings(
        # No index beyond the adapter's own matters, whatever rank its report claims for a client.
        ranks=np.minimum([client.rank for client in origin.clients], rank),
        samples=np.array([client.samples for client in origin.clients]),
        norms=np.sqrt([sum(client.energy) for client in origin.clients]),
        previous_rank=previous_rank if origin.previous and method.uses_previous else 0,
    )
    if method.with_quorum is not None and origin.quorum is not None:
        method = replace(method, rule=method.with_quorum(origin.quorum))
    return energy_factors(method, holdings)


def _predicted_gamma(factors: Sequence[FloatArray | None], rank: int) -> float | None:
    """The geometric mean over the rounds of the largest factor beyond the rank.

    The first round counts only where it is the only one: it had no round before it to shrink.
    """
    known = [one for one in factors if one is not None]
    if not any(one.size > rank for one in known):
        return None
    # A round whose clients hold nothing beyond it leaves nothing there.
    later = [one for one in factors[1:] if one is not None] or known
    largest = [one[rank:].max(initial=0.0) for one in later]
    return float(np.prod(np.power(largest, 1 / len(largest))))


def _predicted(
    first: AdapterRow, factors: Sequence[FloatArray | None], shared_rank: int
) -> list[float | None]:
    """ρ by round, if the first global adapter met these weights round after round, untrained."""
    energy = np.array(first.energy)
    result: list[float | None] = []
    for t, factor in enumerate(factors):
        if t > 0:
            if factor is None:
                break
            energy = energy * np.pad(factor, (0, energy.size))[: energy.size]
        total = float(energy.sum())
        result.append(float(energy[:shared_rank].sum()) / total if total > 0 else None)
    return result + [None] * (len(factors) - len(result))
