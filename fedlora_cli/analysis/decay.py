"""The energy of each rank index over the rounds, predicted from the weights alone.

In a fixed basis and without training, one round multiplies the update at a rank index by the column
sum of the weights there. Source: arXiv:2602.13486.
"""

from __future__ import annotations

import sys
from bisect import bisect_left

import numpy as np

from fedlora_cli.methods.method import Method, step_name
from fedlora_cli.methods.weights import FloatArray, Holdings, Rule

#: The power of the column sum in the energy factor: 4 if B and A are averaged separately.
_POWERS = {"sum": 2, "shared": 2, "average": 4}

#: The rounding error of a sum of up to a million weights.
_ROUNDING = 1e-9


def is_predictable(method: Method) -> bool:
    """Whether the weights alone tell the energy after a round: not for a merge from outside."""
    return isinstance(method.merge, str)


def column_sums(method: Method, holdings: Holdings, rule: Rule | None = None) -> FloatArray:
    """The sum of the weights at each rank index, shape (R,). It includes the previous adapter's
    weight if the method uses one. `rule` replaces the method's own rule.

    >>> from fedlora_cli.methods import METHODS
    >>> example = Holdings(np.array([1, 2]), np.array([30.0, 10.0]), np.ones(2), previous_rank=3)
    >>> column_sums(METHODS["flexlora"], example)
    array([1.  , 0.25, 0.  ])
    >>> column_sums(METHODS["raflora"], example)
    array([1., 1., 1.])
    """
    weights = (rule or method.rule)(holdings)
    sums: FloatArray = weights.clients.sum(axis=0)
    if method.uses_previous:
        sums = sums + weights.previous
    # Rounding must not turn a sum of 1 into an endless decay.
    return np.where(np.abs(sums - 1.0) < _ROUNDING, 1.0, sums)


def energy_factors(method: Method, holdings: Holdings, rule: Rule | None = None) -> FloatArray:
    """The factor by which one round multiplies the energy of each rank index, shape (R,).

    The method must be predictable. The factor is the square of the column sum, or its fourth power
    if B and A are averaged separately.

    >>> from fedlora_cli.methods import METHODS
    >>> example = Holdings(np.array([1, 2]), np.array([10.0, 10.0]), np.ones(2))
    >>> energy_factors(METHODS["flexlora"], example)
    array([1.  , 0.25])
    >>> energy_factors(METHODS["fedavg"], example)
    array([1.    , 0.0625])
    """
    sums: FloatArray = column_sums(method, holdings, rule) ** _POWERS[step_name(method.merge)]
    return sums


def gamma(factors: FloatArray, shared: int) -> float | None:
    """The largest factor beyond the first `shared` rank indices: the decay rate of 1 - ρ in the
    long run. None if there is no further rank index.

    >>> gamma(np.array([1.0, 0.25, 0.04]), shared=1)
    0.25
    """
    return float(factors[shared:].max()) if len(factors) > shared else None


def energy_ratio(
    energies: FloatArray, factors: FloatArray, shared: int, rounds: float = 0
) -> float:
    """ρ after `rounds` rounds from these energies, both arrays of shape (R,).

    >>> energy_ratio(np.array([2.0, 2.0]), np.array([1.0, 0.25]), shared=1, rounds=1)
    0.8
    """
    # Divided by the largest factor, some energy always stays positive.
    left = energies * (factors / factors.max()) ** rounds
    return float(left[:shared].sum() / left.sum())


def rounds_until(
    threshold: float, energies: FloatArray, factors: FloatArray, shared: int
) -> int | None:
    """The first round after which ρ exceeds `threshold`: 0 for at the start, None for never.

    No factor beyond the shared rank may exceed those within it, so that ρ never falls.

    >>> rounds_until(0.9, np.array([2.0, 2.0]), np.array([1.0, 0.25]), shared=1)
    2
    >>> rounds_until(0.9, np.array([2.0, 2.0]), np.array([1.0, 1.0]), shared=1)
    """

    def exceeds(rounds: float) -> bool:
        # Equality up to rounding does not count.
        return energy_ratio(energies, factors, shared, rounds) > threshold * (1 + _ROUNDING)

    if not (exceeds(0) or exceeds(np.inf)):
        return None
    return bisect_left(range(sys.maxsize), True, key=exceeds)
