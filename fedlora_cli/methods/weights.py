"""Rules: the weight of each client at each rank index.

A rule is a pure function `Holdings -> Weights` for a module. Weights by rank index are equivalent
to the papers' partitions by distinct rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Holdings:
    """The rank indices that each client holds in a module.

    Shapes: `ranks`, `samples` and `norms` are (K,). A client that does not adapt the module has
    rank 0. `norms` are ‖ΔW_k‖_F. `previous_rank` is the rank of the previous
    global adapter in this module, 0 without one.
    """

    ranks: IntArray
    samples: FloatArray
    norms: FloatArray
    previous_rank: int = 0

    @property
    def rank(self) -> int:
        """R, the number of rank indices that any client or the previous adapter holds."""
        return max(int(self.ranks.max(initial=0)), self.previous_rank)

    @property
    def held(self) -> FloatArray:
        """(K, R): 1 where client k holds rank index i (r_k > i), else 0."""
        return (self.ranks[:, None] > np.arange(self.rank)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Weights:
    """The diagonals of ΔW = sum_k s_k B_k diag(w_k) A_k + s_g B_g diag(w_g) A_g.

    Shapes: `clients` (K, R), zero where a client does not hold the index; `previous` (R,).
    """

    clients: FloatArray
    previous: FloatArray


Rule = Callable[[Holdings], Weights]


def coverage(holdings: Holdings) -> FloatArray:
    """c_i = N(i) / N, the share of samples that hold rank index i. Shape (R,).

    >>> example = Holdings(np.array([1, 2]), np.array([30.0, 10.0]), np.ones(2))
    >>> coverage(example)
    array([1.  , 0.25])
    """
    return _fraction(holdings.samples @ holdings.held, holdings.samples.sum())


def by_samples(holdings: Holdings) -> Weights:
    """w_k[i] = p_k = n_k / N for each index that k holds; the previous adapter has weight 0.

    The columns sum to the coverage c_i, so the energy sinks into the shared ranks.

    >>> example = Holdings(np.array([1, 2]), np.array([30.0, 10.0]), np.ones(2))
    >>> by_samples(example).clients
    array([[0.75, 0.  ],
           [0.25, 0.25]])
    """
    return _scalar(holdings, _fraction(holdings.samples, holdings.samples.sum()))


def uniform(holdings: Holdings) -> Weights:
    """w_k[i] = 1 / K over the K clients that adapt the module."""
    adapts = (holdings.ranks > 0).astype(np.float64)
    return _scalar(holdings, _fraction(adapts, adapts.sum()))


def by_norm(holdings: Holdings) -> Weights:
    """w_k[i] = ‖ΔW_k‖_F / sum_j ‖ΔW_j‖_F (HetLoRA, arXiv:2401.06432); uniform if all are zero."""
    if not holdings.norms.any():
        return uniform(holdings)
    return _scalar(holdings, holdings.norms / holdings.norms.sum())


def by_holders(holdings: Holdings, quorum: float) -> Weights:
    """w_k[i] = n_k / D(i) for the holders of i, w_g[i] = 1 - N(i) / D(i), D(i) = max(N(i), q N).

    The previous global adapter has the rest of the weight: all of it if no client holds i.
    The quorum q = 0 is raFLoRA (arXiv:2602.13486), q = 1 the residual form (arXiv:2505.18494).

    >>> example = Holdings(np.array([1, 2]), np.array([30.0, 10.0]), np.ones(2), previous_rank=3)
    >>> by_holders(example, quorum=0.0).clients
    array([[0.75, 0.  , 0.  ],
           [0.25, 1.  , 0.  ]])
    >>> by_holders(example, quorum=0.5).previous
    array([0. , 0.5, 1. ])
    """
    held_samples = holdings.samples @ holdings.held
    denominator = np.maximum(held_samples, quorum * holdings.samples.sum())
    return Weights(
        clients=holdings.held * _fraction(holdings.samples[:, None], denominator),
        previous=_previous_only(holdings, 1.0 - _fraction(held_samples, denominator)),
    )


def capped(weights: Weights, limit: float, previous_rank: int = 0) -> Weights:
    """Limit the weight of each client at each rank index to `limit`, in (0, 1].

    The excess goes to the other holders of the index in proportion to their weights, until all are
    at the limit. The rest goes to the previous global adapter of rank `previous_rank`. At an index
    that it does not hold, the rest is lost.

    >>> rule = Weights(np.array([[0.5, 0.0], [0.3, 0.6], [0.2, 0.4]]), np.zeros(2))
    >>> capped(rule, 0.4).clients
    array([[0.4 , 0.  ],
           [0.36, 0.4 ],
           [0.24, 0.4 ]])
    >>> capped(rule, 0.4, previous_rank=2).previous
    array([0. , 0.2])
    """
    clients = weights.clients
    # Sorted by weight, so that no sum depends on the order of the clients.
    none_left = np.zeros((1, clients.shape[1]))
    descending = np.concatenate([np.sort(clients, axis=0)[::-1], none_left])
    # With the j heaviest at the limit, `spare` is left for the others, whose sum is now `rest`.
    rest = np.cumsum(descending[::-1], axis=0)[::-1]
    spare = rest[0] - limit * np.arange(len(descending))[:, None]
    # The smallest j at which the next weight, scaled up like all others, is within the limit.
    j = (spare * descending <= limit * rest).argmax(axis=0, keepdims=True)
    lightest, spare, rest = (np.take_along_axis(one, j, 0)[0] for one in (descending, spare, rest))
    lifted = np.minimum(clients * _fraction(spare, rest), limit)
    left = np.where(rest > 0, 0.0, np.maximum(spare, 0.0))
    kept = np.arange(clients.shape[1]) < previous_rank
    return Weights(
        # Equal weights are treated equally: all or none of them are at the limit.
        clients=np.where(clients > lightest, limit, lifted),
        previous=weights.previous + np.where(kept, left, 0.0),
    )


def _scalar(holdings: Holdings, share: FloatArray) -> Weights:
    """The same weight at each index that a client holds."""
    return Weights(holdings.held * share[:, None], np.zeros(holdings.rank))


def _previous_only(holdings: Holdings, weights: FloatArray) -> FloatArray:
    """The weights of the previous adapter: 0 beyond its rank."""
    return np.where(np.arange(holdings.rank) < holdings.previous_rank, weights, 0.0)


def _fraction(part: FloatArray, whole: FloatArray | float) -> FloatArray:
    """part / whole, and 0 where the whole is 0."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.divide(part, whole, out=np.zeros(shape), where=np.broadcast_to(whole, shape) > 0)
