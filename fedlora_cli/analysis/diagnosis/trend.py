"""ρ over a series of rounds: the measured decay, and the decay that the weights predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora_cli.analysis.decay import energy_factors, is_predictable
from fedlora_cli.analysis.diagnosis.verdict import kept
from fedlora_cli.linalg.spectrum import FloatArray, mean_share
from fedlora_cli.methods import known
from fedlora_cli.methods.weights import Holdings
from fedlora_cli.reports.diagnose import AdapterRow, Trend
from fedlora_cli.reports.provenance import Contributor, Provenance

#: The fewest rounds for a fit: two points lie on a line always.
_FEWEST = 3


@dataclass(frozen=True)
class EnergyCourse:
    """The energy beyond one rank, by round: its share in the global adapter, its share in the
    updates of the clients with a higher rank, and κ; and the factor that the weights predict.
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
) -> EnergyCourse:
    """The energy beyond `rank` in these global adapters, in the order of their rounds.

    If the clients' energy is unknown for a round, every round is compared with the global adapter
    of the round before, so κ compares with the first round.
    """
    beyond = [mean_share([row.energy], [1.0], rank, None) for row in rows]
    known = [origin for origin in origins if origin is not None]
    if len(known) == len(rows):
        brought = [clients_beyond(origin.clients, rank) for origin in known]
        reference = brought
    else:
        brought = [None] * len(rows)
        reference = [beyond[0], *brought[1:]]
    kappa = tuple(kept(beyond, reference))
    gamma = _predicted_gamma(factors, rank)
    return EnergyCourse(rank, tuple(beyond), tuple(brought), kappa, gamma)


def trend(
    rows: Sequence[AdapterRow],
    factors: Sequence[FloatArray | None],
    shared: EnergyCourse,
    judged: EnergyCourse,
) -> Trend:
    """The trend of the rounds: ρ at the shared rank, and κ at the rank of the verdict."""
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
    """The share of energy beyond the rank in the updates of the clients with a higher rank,
    averaged by samples. None if there is no such client, or none has any energy.
    """
    holders = [client for client in clients if client.rank > rank]
    return mean_share([c.energy for c in holders], [c.samples for c in holders], rank, None)


def fit(values: Sequence[float | None]) -> tuple[int | None, float | None, float | None]:
    """The fit of a geometric series: its first round (from 1), the factor γ per round, and r².

    Least squares of ln value over the round, on the later half of the positive values and at least
    three of them: late rounds show the slowest decay. None for fewer than three positive values.

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
    # A constant series has no r².
    varies = spread > len(rounds) * np.finfo(np.float64).eps
    r_squared = 1 - residual / spread if varies else None
    return int(rounds[0]) + 1, float(np.exp(slope)), r_squared


def _odds(beyond: float | None) -> float | None:
    """h / (1 - h): the energy beyond the shared rank relative to the energy within it.

    Weights that sum to 1 within the shared rank multiply it by exactly γ per round. For ρ near 1 it
    equals 1 - ρ.
    """
    return None if beyond is None or beyond >= 1 else beyond / (1 - beyond)


def energy_factors_by_round(
    rows: Sequence[AdapterRow], origins: Sequence[Provenance | None]
) -> list[FloatArray | None]:
    """The energy factor of each rank index, by round; None if the weights are unknown."""
    earlier = [rows[0], *rows]
    return [
        _factors(before.rank, row.rank, origin)
        for before, row, origin in zip(earlier, rows, origins, strict=False)
    ]


def _factors(previous_rank: int, rank: int, origin: Provenance | None) -> FloatArray | None:
    # Momentum depends on two rounds; ranks that differ by module give different weights.
    if origin is None or origin.momentum or not origin.uniform:
        return None
    method = known(origin.method)
    if method is None or not is_predictable(method):
        return None
    holdings = Holdings(
        # The rank of the adapter limits the ranks that its untrusted report claims.
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

    The first round counts only if it is the only round, because no round precedes it.
    """
    known = [factor for factor in factors if factor is not None]
    if not any(factor.size > rank for factor in known):
        return None
    # A round without any client above the rank leaves no energy there.
    later = [factor for factor in factors[1:] if factor is not None] or known
    largest = [factor[rank:].max(initial=0.0) for factor in later]
    return float(np.prod(np.power(largest, 1 / len(largest))))


def _predicted(
    first: AdapterRow, factors: Sequence[FloatArray | None], shared_rank: int
) -> list[float | None]:
    """ρ by round if the weights of each round act on the first global adapter, without training."""
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
