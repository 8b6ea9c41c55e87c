"""The forecast of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora_cli.analysis import decay
from fedlora_cli.analysis.prediction.outlook import outlook
from fedlora_cli.analysis.prediction.population import Population, Round
from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import FloatArray, Holdings, Rule
from fedlora_cli.reports.predict import MethodForecast

#: Bounds on the rounds of a forecast that ends when every method has collapsed that does.
_FEWEST, _MOST = 10, 100


def forecast(
    rows: Mapping[str, tuple[Method, Rule]],
    clients: Population,
    rounds: Sequence[Round],
    energies: FloatArray,
    last: int | None = None,
) -> dict[str, MethodForecast]:
    """The forecast of every row; a row is a method with a rule.

    Expectations are means over `rounds`; `energies` (P,) are those of round 0. The forecast ends
    in the round `last` with a verdict; without it, where every method has collapsed that does.
    """
    factors = {name: _expected(*row, rounds) for name, row in rows.items()}
    ends = (decay.rounds_until(0.99, energies, f, shared=1) for f in factors.values())
    shown = last or min(_MOST, max(_FEWEST, *(end or 0 for end in ends)))
    forecasts = {
        name: _forecast(name, *row, clients, energies, factors[name], shown)
        for name, row in rows.items()
    }
    if last is None:
        return forecasts
    return {
        name: replace(one, **outlook(clients.bounds, energies, factors[name], last))
        for name, one in forecasts.items()
    }


def _forecast(
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
    largest = weights[: everyone.singles].max(axis=1)
    heaviest = int(largest.argmax())
    return MethodForecast(
        name=name,
        weights=_by_rank(weights, everyone.holdings),
        column_sums=clients.by_index(decay.column_sums(method, everyone.holdings, rule)),
        energy_factors=clients.by_index(factors),
        gamma=decay.gamma(factors, shared=1),
        rounds_to_90=decay.rounds_until(0.9, energies, factors, shared=1),
        rounds_to_99=decay.rounds_until(0.99, energies, factors, shared=1),
        energy_ratio=tuple(decay.energy_ratio(energies, factors, 1, t) for t in range(shown + 1)),
        largest_weight=float(largest[heaviest]),
        heaviest_rank=int(clients.bounds[everyone.holdings.ranks[heaviest] - 1]),
        note=_note(method),
    )


def _by_rank(weights: FloatArray, holdings: Holdings) -> tuple[tuple[float, ...], ...]:
    """The sum of the weights by rank and partition, shape (P, P)."""
    total = np.zeros((holdings.rank, weights.shape[1]))
    np.add.at(total, holdings.ranks - 1, weights)
    return tuple(tuple(map(float, row)) for row in total)


def _note(method: Method) -> str:
    """The assumption behind the forecast of a method."""
    if method.uses_previous:
        return "with --previous from round 2 on"
    if method.uses_norms:
        return "assuming equal norms"
    return ""


def _expected(method: Method, rule: Rule, rounds: Sequence[Round]) -> FloatArray:
    """The mean energy factor of each partition over the rounds, shape (P,)."""
    times = np.array([round_.times for round_ in rounds], dtype=np.float64)
    factors = np.array([decay.energy_factors(method, round_.holdings, rule) for round_ in rounds])
    mean: FloatArray = times @ factors / times.sum()
    return mean


def start_energies(clients: Population, start: float | None) -> FloatArray:
    """The energy of each partition in round 0, shape (P,)."""
    widths = np.diff(clients.bounds, prepend=0).astype(np.float64)
    if start is None or len(widths) == 1:
        return widths
    beyond = (1 - start) / widths[1:].sum()
    return np.concatenate([[start], beyond * widths[1:]])
