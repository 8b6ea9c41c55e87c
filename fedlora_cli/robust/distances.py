"""Distances between clients of different rank, compared at the lower rank of each pair.

Honest clients of rank 4 and rank 32 keep different parts of the same update. Their plain distance
is mostly the part that rank 4 cannot hold, and an update of rank 32 contains more training noise.
Both effects separate ranks, not clients. So the updates of a pair are truncated to the lower of
their two ranks, and their distance is divided by the typical distance at that rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.methods.weights import FloatArray, IntArray
from fedlora_cli.robust.median import lower_median


@dataclass(frozen=True, eq=False)
class ByLevel:
    """Squared distances of K clients in one module, truncated at each of L levels.

    - `levels`: ranks, ascending.
    - `distances` (L, K, K): ‖T_m(ΔW_j) - T_m(ΔW_k)‖_F², where T_m is the SVD truncated to rank m,
      the smallest of r_j, r_k and the level. Symmetric, zero on the diagonal.
    - `ranks` (K,): numerical ranks r_k, independent of the basis (B Q, Q⁻¹ A) and of the declared
      rank. 0 for a client that does not adapt the module.
    """

    levels: tuple[int, ...]
    distances: FloatArray
    ranks: IntArray


@dataclass(frozen=True, eq=False)
class Comparison:
    """For each pair of K clients: squared distance, typical squared distance, and number of modules
    that both clients adapt. All (K, K); `+` sums over modules.
    """

    distances: FloatArray
    typical: FloatArray
    shared: FloatArray

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.distances + other.distances,
            self.typical + other.typical,
            self.shared + other.shared,
        )


def by_level(updates: Sequence[Factors | None], levels: Sequence[int]) -> ByLevel:
    """Squared distances in one module; an update is None for a client that does not adapt it.

    `levels` are the distinct ranks of all clients, ascending. The result keeps the levels that
    `in_units` needs: the first level at or above each client's rank, and the last level. A zero
    update is compared at its declared rank. T_m is not unique if s_m = s_m+1.

    >>> rank_2 = Factors(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> rank_1 = Factors(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> by_level([rank_2, rank_1, None], levels=[1, 2]).distances[-1]
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 0., 0.]])
    """
    ranks = np.zeros(len(updates), dtype=np.int64)
    present = [k for k, update in enumerate(updates) if update is not None]
    svds = [_svd(update) for update in updates if update is not None]
    ranks[present] = [svd.s.numel() for svd in svds]
    kept = sorted({levels[at] for at in _reached(levels, ranks[present])} | {levels[-1]})
    distances = np.zeros((len(kept), len(updates), len(updates)))
    if svds:
        at = np.ix_(range(len(kept)), present, present)
        distances[at] = _distances(svds, ranks[present], np.asarray(kept))
    return ByLevel(tuple(kept), distances, ranks)


def _reached(levels: Sequence[int], ranks: IntArray) -> IntArray:
    """The index of the first level at or above each rank; of the last level if there is none."""
    return np.searchsorted(levels[:-1], ranks)


def in_units(module: ByLevel) -> Comparison:
    """The distances of one module, with the typical squared distance at the level of each pair.

    The level of a pair is the first at or above the lower of its two ranks. The typical squared
    distance of a level is a median of medians: over the clients that reach the level, truncated to
    it, of each client's median squared distance to the others. Distances of 0 (equal updates, no
    common module) are left out. Attackers raise it only if they are half of these clients.
    """
    reached = _reached(module.levels, module.ranks)
    adapts = module.ranks > 0
    typical = np.zeros(len(module.levels))
    for level, distances in enumerate(module.distances):
        at = adapts & (reached >= level)
        typical[level] = lower_median([lower_median(row) for row in distances[np.ix_(at, at)]])
    shared = np.outer(adapts, adapts).astype(np.float64)
    return Comparison(
        module.distances[-1], shared * typical[np.minimum.outer(reached, reached)], shared
    )


def compare(updates: Sequence[Factors | None], levels: Sequence[int]) -> Comparison:
    """The comparison of K clients in one module; arguments as of `by_level`."""
    return in_units(by_level(updates, levels))


def relative(comparison: Comparison) -> FloatArray:
    """Squared distances divided by the typical squared distances of the pair's modules: (K, K).

    0 means equal updates and 1 a typical distance, for any rank and number of modules. A pair
    without a common module gets 1. A distance beyond the range of float64 is infinite.

    >>> apart = np.array([[[0.0, 2.0, 8.0], [2.0, 0.0, 8.0], [8.0, 8.0, 0.0]]])
    >>> relative(in_units(ByLevel((4,), apart, np.array([4, 4, 4]))))
    array([[0., 1., 4.],
           [1., 0., 4.],
           [4., 4., 0.]])
    """
    distances, typical = comparison.distances, comparison.typical
    with np.errstate(over="ignore", invalid="ignore"):
        units = np.divide(distances, typical, out=np.zeros_like(distances), where=typical > 0)
    units[comparison.shared == 0] = 1.0
    np.fill_diagonal(units, 0.0)
    unbounded: FloatArray = np.fmin(units, np.inf)  # NaN, an overflow, becomes infinite
    return unbounded


def _svd(factors: Factors) -> lowrank.Svd:
    """The SVD without null directions; a zero update gets its declared rank in zeros."""
    ones = torch.ones(factors.rank, dtype=torch.float64, device=factors.B.device)
    svd = lowrank.svd(lowrank.orthogonalize([factors]), ones)[0]
    if svd.s.numel():
        return svd
    out_features, in_features = factors.shape
    return lowrank.Svd(
        ones.new_zeros(out_features, factors.rank),
        ones.new_zeros(factors.rank),
        ones.new_zeros(factors.rank, in_features),
    )


def _distances(svds: Sequence[lowrank.Svd], ranks: IntArray, levels: IntArray) -> FloatArray:
    """Squared distances (L, K, K) of K clients that all adapt the module.

    ‖T_m(ΔW_k)‖² = sum s_a² and ‹T_m(ΔW_j), T_m(ΔW_k)› = sum s_a s_b (u_aᵀ u_b) (v_aᵀ v_b) over
    directions a, b < m of j and of k: one strip of Gram matrices for each client.
    """
    starts = np.cumsum([0, *ranks])
    index = np.concatenate([np.arange(r) for r in ranks])
    owners = np.repeat(np.arange(len(ranks)), ranks)
    U, V = torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh for svd in svds])
    s = torch.cat([svd.s for svd in svds])
    inner = np.zeros((len(levels), len(ranks), len(ranks)))
    for j, first in enumerate(starts[:-1]):
        of_j, later = slice(first, starts[j + 1]), slice(first, None)
        gram = (U[:, of_j].T @ U[:, later]) * (V[of_j] @ V[later].T)
        products = (gram * torch.outer(s[of_j], s[later])).cpu().numpy()
        # The larger index of each pair of directions; it must be below both ranks and the level.
        depth = np.maximum.outer(index[of_j], index[later])
        within = depth < np.minimum(ranks[j], ranks[owners[later]])
        for level, m in enumerate(levels):
            columns = np.where(within & (depth < m), products, 0.0).sum(axis=0)
            inner[level, j, j:] = np.add.reduceat(columns, starts[j:-1] - first)
    inner += np.triu(inner, 1).transpose(0, 2, 1)
    cumulative = np.zeros((len(ranks), ranks.max() + 1))
    for k, svd in enumerate(svds):
        cumulative[k, 1 : ranks[k] + 1] = svd.s.square().cumsum(0).cpu().numpy()
    m = np.minimum(np.minimum.outer(ranks, ranks), levels[:, None, None])
    energies = cumulative[np.arange(len(ranks))[:, None], m]
    both = energies + energies.transpose(0, 2, 1)
    distances = both - 2 * inner
    # Equal updates differ by rounding alone.
    rounding = np.finfo(np.float64).eps * max(U.shape[0], V.shape[1]) * both
    return np.where(distances > rounding, distances, 0.0)
