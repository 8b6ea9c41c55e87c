"""Which method, which quorum, whether the previous adapter: what the numbers of a forecast say."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.analysis.prediction.population import Round
from fedlora_cli.methods.weights import FloatArray, Rule
from fedlora_cli.reports.predict import MethodForecast, PredictedPartition
from fedlora_cli.text import rank_range

#: More than this of the weight of a rank index, and one client decides there.
MOST_WEIGHT = 0.5

#: In so many of the rounds a quorum shall hold.
MOST_ROUNDS = 0.95


def largest_weights(rule: Rule, rounds: Sequence[Round]) -> FloatArray:
    """The largest weight of a single client anywhere, in each of the rounds."""
    return np.array([rule(one.holdings).clients[: one.singles].max() for one in rounds])


def bounding_quorum(with_quorum: Mapping[float, Rule], rounds: Sequence[Round]) -> float:
    """The smallest quorum under which no client has more than half of the weight of a rank index,
    or more than the largest share of the samples, in 95 % of the rounds, which is in all of them
    where there is one.

    `with_quorum` has the rule for each quorum, ascending to 1, at which weights are shares.
    """
    times = np.array([one.times for one in rounds])
    quorums = list(with_quorum)
    shares = largest_weights(with_quorum[quorums[-1]], rounds)
    # What was half before the rounding of a sum is half.
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
    """A few lines, each of them about one decision. `partial` says that not all clients are in
    every round; `quorum` is the one of `bounding_quorum`.
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
            f"{where}, and only the previous adapter keeps it then"
        )
    if partial and top.alone > 0:
        lines.append(f"{_chance(top.alone)} of the rounds have one lone client at {where}")
    return tuple(lines)


def _method(
    partitions: Sequence[PredictedPartition], forecasts: Mapping[str, MethodForecast]
) -> str:
    if len(partitions) == 1:
        return (
            "all ranks are equal, so nothing can collapse: use flexlora, the exact mean; raflora "
            "and residual have the same weights"
        )
    lost, shared = forecasts["flexlora"], partitions[0]
    where = rank_range(shared.first, shared.last)
    rounds = lost.rounds_to_99
    if rounds is None:
        return "flexlora loses nothing here for good; raflora keeps every rank index as it is"
    when = f"after {rounds} round{'s' * (rounds != 1)}" if rounds else "from the start"
    return (
        "use raflora, or residual with --previous: both keep every rank index; flexlora has more "
        f"than 0.99 of the energy in rank index {where} {when}"
    )


def _quorum(forecasts: Mapping[str, MethodForecast], quorum: float, *, partial: bool) -> str:
    owner, shares = forecasts["raflora"], forecasts["residual"]
    often = f"in {100 * MOST_ROUNDS:g} % of the rounds "
    bound = "nobody has more than half the weight anywhere, or than the largest share of samples"
    if quorum == 0 and partial:
        return f"no quorum needed: {often}{bound}"
    if quorum == 0:
        return f"no quorum needed: no client has more than {owner.largest_weight:.3f} anywhere"
    if partial:
        reason = f"with it, {often}{bound}"
    else:
        most = max(MOST_WEIGHT, shares.largest_weight)
        reason = (
            f"without it a client of rank {owner.heaviest_rank} has weight "
            f"{owner.largest_weight:.3f}, with it nobody has more than {most:.3g} anywhere"
        )
    return f"give --quorum {quorum:g}: {reason}; add --previous, or what they leave decays"


def _chance(probability: float) -> str:
    """A probability as people say it.

    >>> _chance(0.214), _chance(0.0004)
    ('21 %', 'less than 1 %')
    """
    return "less than 1 %" if probability < 0.01 else f"{100 * probability:.0f} %"
