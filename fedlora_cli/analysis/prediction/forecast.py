"""What each method makes of the rounds to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.analysis.decay import (
    column_sums,
    energy_factors,
    energy_ratio,
    gamma,
    rounds_until,
)
from fedlora_cli.analysis.prediction.population import Population, Round
from fedlora_cli.methods import METHODS
from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import FloatArray, Holdings, Rule
from fedlora_cli.reports.predict import MethodForecast

#: Rounds are shown until every method that collapses has, within these bounds.
_FEWEST, _MOST = 10, 100


def forecast(
    rows: Mapping[str, tuple[Method, Rule]],
    clients: Population,
    rounds: Sequence[Round],
    energies: FloatArray,
) -> dict[str, MethodForecast]:
    """The forecast of every row, a method under a rule.

    `rounds` are those over which the expectations are taken, `energies` (P,) those of round 0.
    """
    factors = {name: _expected(*row, rounds) for name, row in rows.items()}
    ends = (rounds_until(0.99, energies, one, shared=1) for one in factors.values())
    shown = min(_MOST, max(_FEWEST, *(end or 0 for end in ends)))
    return {
        name: _one(name, *row, clients, energies, factors[name], shown)
        for name, row in rows.items()
    }


def _one(
    name: str,
    method: Method,
    rule: Rule,
    clients: Population,
    energies: FloatArray,
    factors: FloatArray,
    shown: int,
) -> MethodForecast:
    everyone = clients.everyone()
    weights = rule(everyone.holdings).clients
    own = weights[: everyone.singles].max(axis=1)
    heaviest = int(own.argmax())
    return MethodForecast(
        name=name,
        weights=_by_rank(weights, everyone.holdings),
        column_sums=clients.by_index(column_sums(method, everyone.holdings, rule)),
        energy_factors=clients.by_index(factors),
        gamma=gamma(factors, shared=1),
        rounds_to_90=rounds_until(0.9, energies, factors, shared=1),
        rounds_to_99=rounds_until(0.99, energies, factors, shared=1),
        energy_ratio=tuple(energy_ratio(energies, factors, 1, t) for t in range(shown + 1)),
        largest_weight=float(own[heaviest]),
        heaviest_rank=int(clients.bounds[everyone.holdings.ranks[heaviest] - 1]),
        note=_note(method),
    )


def _by_rank(weights: FloatArray, holdings: Holdings) -> tuple[tuple[float, ...], ...]:
    """The weights of all clients of one rank together, at each partition. Shape (P, P)."""
    total = np.zeros((holdings.rank, weights.shape[1]))
    np.add.at(total, holdings.ranks - 1, weights)
    return tuple(tuple(float(one) for one in row) for row in total)


def _note(method: Method) -> str:
    """What the forecast assumes of the method."""
    if method.uses_previous:
        return "with --previous from round 2 on"
    if method.rule is METHODS["hetlora"].rule:
        return "assuming equal norms"
    return ""


def _expected(method: Method, rule: Rule, rounds: Sequence[Round]) -> FloatArray:
    """The mean factor of the energy of each partition over these rounds. Shape (P,)."""
    times = np.array([one.times for one in rounds], dtype=np.float64)
    factors = np.array([energy_factors(method, one.holdings, rule) for one in rounds])
    mean: FloatArray = times @ factors / times.sum()
    return mean


def start_energies(clients: Population, start: float | None) -> FloatArray:
    """The energy of each partition in round 0. Shape (P,)."""
    widths = np.diff(clients.bounds, prepend=0).astype(np.float64)
    if start is None or len(widths) == 1:
        return widths
    beyond = (1 - start) / widths[1:].sum()
    return np.concatenate([[start], beyond * widths[1:]])
