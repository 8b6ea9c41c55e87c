"""Which method, which quorum, whether the previous adapter: what the numbers of a forecast say."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.analysis.prediction.population import Round
from fedlora_cli.render.report.aggregate import rank_range
from fedlora_cli.render.report.predict import MethodForecast, PredictedPartition
from fedlora_cli.weights import FloatArray, Rule

#: More than this of the weight of a rank index, and one client decides there.
MOST_WEIGHT = 0.5

#: In so many of the rounds a quorum shall hold.
MOST_ROUNDS = 0.95


def largest_weights(rule: Rule, rounds: Sequence[Round]) -> FloatArray:
    """The largest weight of a single client anywhere, in each of the rounds."""
    return np.array([rule(one.holdings).clients[: one.singles].max() for one in rounds])


def bounding_quorum(with_quorum: Mapping[float, Rule], rounds: Sequence[Round]) -> float | None:
    """The smallest quorum under which no client has more than half of the weight of a rank index in
    95 % of the rounds, which is in all of them where there is one. None if not even the largest.

    `with_quorum` has the rule for each quorum, ascending.
    """
    times = np.array([one.times for one in rounds])

    def bounds(quorum: float) -> bool:
        # What was half before the rounding of a sum is half.
        within = largest_weights(with_quorum[quorum], rounds) <= MOST_WEIGHT * (1 + 1e-12)
        return bool(times @ within >= MOST_ROUNDS * times.sum())

    quorums = list(with_quorum)
    place = bisect_left(quorums, True, key=bounds)
    return quorums[place] if place < len(quorums) else None


def advise(
    partitions: Sequence[PredictedPartition],
    forecasts: Mapping[str, MethodForecast],
    quorum: float | None,
    *,
    partial: bool,
) -> tuple[str, ...]:
    """A few lines, each of them about one decision. `partial` says that not all clients are in
    every round; `quorum` is the one of `bounding_quorum`.
    """
    lines = [
        _method(partitions, forecasts),
        _quorum(forecasts["raflora"], quorum, partial=partial),
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


def _quorum(owner: MethodForecast, quorum: float | None, *, partial: bool) -> str:
    often = f"in {100 * MOST_ROUNDS:g} % of the rounds"
    if quorum is None and partial:
        return f"no quorum helps: too few are present to hold everyone to half the weight {often}"
    if quorum is None:
        return "no quorum helps: one client has more than half of all samples"
    if quorum == 0 and partial:
        return f"no quorum needed: {often} no client has more than half the weight anywhere"
    if quorum == 0:
        return f"no quorum needed: no client has more than {owner.largest_weight:.3f} anywhere"
    without = f"a client of rank {owner.heaviest_rank} has weight {owner.largest_weight:.3f}"
    reason = f"with it, {often} " if partial else f"without it {without}, with it "
    return (
        f"give --quorum {quorum:g}: {reason}nobody has more than half the weight anywhere; "
        "add --previous, or what they leave decays"
    )


def _chance(probability: float) -> str:
    """A probability as people say it.

    >>> _chance(0.214), _chance(0.0004)
    ('21 %', 'less than 1 %')
    """
    return "less than 1 %" if probability < 0.01 else f"{100 * probability:.0f} %"
