"""Advice from a forecast: the method, the quorum, and whether to give the previous adapter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.analysis.prediction.population import Round
from fedlora_cli.methods.weights import FloatArray, Rule
from fedlora_cli.reports.predict import MethodForecast, PredictedPartition
from fedlora_cli.text import rank_range

#: The largest acceptable weight of one client at a rank index.
MOST_WEIGHT = 0.5

#: The share of the rounds in which a quorum must keep that limit.
MOST_ROUNDS = 0.95


def largest_weights(rule: Rule, rounds: Sequence[Round]) -> FloatArray:
    """The largest weight of a single client at any rank index, by round."""
    return np.array([rule(r.holdings).clients[: r.singles].max() for r in rounds])


def bounding_quorum(with_quorum: Mapping[float, Rule], rounds: Sequence[Round]) -> float:
    """The smallest quorum that limits the weight of every client in 95 % of the rounds: to half, or
    to the largest share of the samples if that is more.

    `with_quorum` maps each quorum to its rule, ascending to 1, where weights are sample shares.
    """
    times = np.array([round_.times for round_ in rounds])
    quorums = list(with_quorum)
    shares = largest_weights(with_quorum[quorums[-1]], rounds)
    # Rounding must not push a weight of exactly one half over the limit.
    most = np.maximum(MOST_WEIGHT, shares) * (1 + 1e-12)

    def bounds(quorum: float) -> bool:
        within = largest_weights(with_quorum[quorum], rounds) <= most
        return bool(times @ within >= MOST_ROUNDS * times.sum())

    return quorums[bisect_left(quorums, True, key=bounds)]


def advise(
    partitions: Sequence[PredictedPartition],
    forecasts: Mapping[str, MethodForecast],
    quorum: float,
    *,
    partial: bool,
) -> tuple[str, ...]:
    """One sentence per decision. `quorum` comes from `bounding_quorum`; `partial` is true if some
    clients miss a round.
    """
    lines = [
        _method(partitions, forecasts),
        _quorum(forecasts, quorum, partial=partial),
    ]
    top = partitions[-1]
    where = rank_range(top.first, top.last)
    if top.absent > 0:
        lines.append(
            f"give --previous: {_chance(top.absent)} of the rounds have no client for rank index "
            f"{where}, and then only the previous adapter keeps it"
        )
    if partial and top.alone > 0:
        lines.append(
            f"{_chance(top.alone)} of the rounds have a single client for rank index {where}"
        )
    return tuple(lines)


def _method(
    partitions: Sequence[PredictedPartition], forecasts: Mapping[str, MethodForecast]
) -> str:
    if len(partitions) == 1:
        return (
            "all ranks are equal, so no rank can collapse: use flexlora, the exact mean; raflora "
            "and residual have the same weights"
        )
    lost, shared = forecasts["flexlora"], partitions[0]
    where = rank_range(shared.first, shared.last)
    rounds = lost.rounds_to_99
    if rounds is None:
        return "flexlora keeps energy in every rank index here; raflora keeps all of it"
    when = f"after {rounds} round{'s' * (rounds != 1)}" if rounds else "from the start"
    return (
        "use raflora, or residual with --previous: both keep every rank index; flexlora puts more "
        f"than 0.99 of the energy in rank index {where} {when}"
    )


def _quorum(forecasts: Mapping[str, MethodForecast], quorum: float, *, partial: bool) -> str:
    raflora, residual = forecasts["raflora"], forecasts["residual"]
    often = f"in {100 * MOST_ROUNDS:g} % of the rounds "
    bound = "no client exceeds half the weight of a rank index, or the largest share of samples"
    if quorum == 0 and partial:
        return f"no quorum needed: {often}{bound}"
    if quorum == 0:
        return f"no quorum needed: no weight of a client exceeds {raflora.largest_weight:.3f}"
    if partial:
        reason = f"with it, {often}{bound}"
    else:
        most = max(MOST_WEIGHT, residual.largest_weight)
        reason = (
            f"without it a client of rank {raflora.heaviest_rank} has weight "
            f"{raflora.largest_weight:.3f}, with it no weight exceeds {most:.3g}"
        )
    return f"give --quorum {quorum:g}: {reason}; add --previous, or the rest decays"


def _chance(probability: float) -> str:
    """A probability in whole percent.

    >>> _chance(0.214), _chance(0.0004)
    ('21 %', 'less than 1 %')
    """
    return "less than 1 %" if probability < 0.01 else f"{100 * probability:.0f} %"
