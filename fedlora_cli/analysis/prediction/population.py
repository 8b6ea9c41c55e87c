"""The clients of a federation, and the clients that are present in a round.

Distinct ranks bound the partitions. All rank indices of a partition have the same weights, so the
holdings here are those of the partitions, numbered 1..P, instead of the rank indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fedlora_cli.methods.weights import FloatArray, Holdings, IntArray

#: The most possible rounds that are enumerated; beyond it, this number is drawn with this seed.
DRAWS = 1000
SEED = 2602_13486


@dataclass(frozen=True, eq=False)
class Round:
    """The holdings of the clients present in a round that occurs `times` times.

    The clients of one rank make at most two rows: the client with most samples, and the sum of the
    others. This keeps the column sums and the weight of the largest client. The first `singles`
    rows are single clients.
    """

    holdings: Holdings
    singles: int
    times: int


@dataclass(frozen=True, eq=False)
class Population:
    """The clients by class: a class has one rank and one sample count.

    `bounds` (P,) are the distinct ranks, ascending. By class, shape (C,), ordered by rank and then
    by samples: `level` is the number 1..P of the rank, `samples` the count of each client, `sizes`
    the number of clients.
    """

    bounds: IntArray
    level: IntArray
    samples: FloatArray
    sizes: IntArray

    @property
    def clients(self) -> int:
        """The number of clients K."""
        return int(self.sizes.sum())

    @property
    def holders(self) -> IntArray:
        """The number of clients that hold each partition, shape (P,)."""
        return _holders_sum(self.level, self.sizes).astype(np.int64)

    @property
    def coverage(self) -> FloatArray:
        """The share of the samples that the holders of each partition have, shape (P,)."""
        samples = _holders_sum(self.level, self.sizes * self.samples)
        share: FloatArray = samples / samples[0]
        return share

    def by_index(self, values: FloatArray) -> tuple[float, ...]:
        """The values of the partitions (P,) repeated for their rank indices (R,)."""
        return tuple(np.repeat(values, np.diff(self.bounds, prepend=0)).tolist())

    def everyone(self) -> Round:
        """The round in which all clients are present."""
        return self._rounds(self.sizes[None, :])[0]

    def rounds(self, present: int) -> tuple[Round, ...]:
        """The rounds of `present` clients, chosen uniformly and without replacement.

        All possible rounds with their multiplicity if there are at most DRAWS; otherwise DRAWS
        random rounds from a fixed seed.
        """
        if not self.sampled(present):
            clients = np.repeat(np.arange(len(self.sizes)), self.sizes)
            chosen = combinations(clients, present)
            drawn = np.array([np.bincount(c, minlength=len(self.sizes)) for c in chosen])
        else:
            rng = np.random.default_rng(SEED)
            drawn = np.array(
                [rng.multivariate_hypergeometric(self.sizes, present) for _ in range(DRAWS)]
            )
        return self._rounds(drawn)

    def sampled(self, present: int) -> bool:
        """Whether `rounds` draws at random, because there are too many rounds to enumerate."""
        if present == self.clients:
            return False
        return self.clients > DRAWS or math.comb(self.clients, present) > DRAWS

    def _rounds(self, drawn: IntArray) -> tuple[Round, ...]:
        """The rounds with these numbers of clients by class, (rounds, C), equal ones merged."""
        length = len(self.bounds) + 1
        rows = np.zeros((len(drawn), 3, length))
        for row, sizes in zip(rows, drawn, strict=True):
            row[0] = np.bincount(self.level, sizes, length)
            row[1] = np.bincount(self.level, sizes * self.samples, length)
            np.maximum.at(row[2], self.level, self.samples * (sizes > 0))
        different, times = np.unique(rows[..., 1:], axis=0, return_counts=True)
        return tuple(
            _round(counts, totals, largest, int(n))
            for (counts, totals, largest), n in zip(different, times, strict=True)
        )


def population(ranks: Sequence[int], samples: Sequence[float]) -> Population:
    """The population with these ranks and sample counts, by client.

    >>> example = population([4, 8, 4], [10, 5, 10])
    >>> example.bounds, example.level, example.samples, example.sizes
    (array([4, 8]), array([1, 2]), array([10.,  5.]), array([2, 1]))
    """
    pairs = np.array([ranks, samples], dtype=np.float64)
    classes, sizes = np.unique(pairs, axis=1, return_counts=True)
    bounds, level = np.unique(classes[0].astype(np.int64), return_inverse=True)
    return Population(bounds, level.reshape(-1) + 1, classes[1], sizes)


def absent(clients: int, holders: int, present: int) -> float:
    """The probability that no holder is present: comb(K - H, m) / comb(K, m) of the hypergeometric
    distribution, as a product that never overflows.

    >>> absent(4, 1, 2), absent(4, 3, 2)
    (0.5, 0.0)
    """
    few, many = sorted((holders, present))
    steps = np.arange(few)
    return float(np.prod(np.maximum(clients - many - steps, 0) / (clients - steps)))


def alone(clients: int, holders: int, present: int) -> float:
    """The probability that exactly one holder is present.

    >>> alone(4, 1, 2), alone(4, 2, 2)
    (0.5, 0.6666666666666666)
    """
    return holders * present / clients * absent(clients - 1, holders - 1, present - 1)


def _round(counts: FloatArray, totals: FloatArray, largest: FloatArray, times: int) -> Round:
    """The round with these clients, samples and largest sample counts by level."""
    single = np.flatnonzero(counts > 0)
    several = np.flatnonzero(counts > 1)
    rows = np.concatenate([single, several])
    rest = totals - largest
    return Round(
        Holdings(
            ranks=rows + 1,
            samples=np.concatenate([largest[single], rest[several]]),
            norms=np.concatenate([np.ones(len(single)), counts[several] - 1]),
            previous_rank=len(counts),
        ),
        singles=len(single),
        times=times,
    )


def _holders_sum(level: IntArray, values: IntArray | FloatArray) -> FloatArray:
    """The sum of the values over the holders of each partition, shape (P,)."""
    by_level = np.bincount(level, values)[1:].astype(np.float64)
    return np.cumsum(by_level[::-1])[::-1]
