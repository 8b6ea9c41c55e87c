"""How far apart clients of different rank are, compared on the ranks that both of them fill.

Honest clients of rank 4 and 32 keep different parts of one update. Their plain distance is mostly
what rank 4 cannot hold: it would tell ranks apart, not clients. And what is noise in a client's
training is a larger part of what rank 32 holds than of what rank 4 does. So a pair is compared at
the lower of its two ranks, and measured by what is typical at that rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.methods.weights import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class ByLevel:
    """Squared distances of K clients in one module, at L levels, ascending ranks: those that a
    client of the module reaches as its first, and the last.

    `distances` (L, K, K) are ‖T_m(ΔW_j) - T_m(ΔW_k)‖_F², T_m the truncated SVD and m the smallest
    of r_j, r_k and the level: symmetric, zero on the diagonal. `ranks` (K,) are numerical, 0 where
    a client does not adapt the module: neither the basis (B Q, Q⁻¹ A) nor a rank that is declared
    but not filled matters.
    """

    levels: tuple[int, ...]
    distances: FloatArray
    ranks: IntArray


@dataclass(frozen=True, eq=False)
class Comparison:
    """Squared distances of K clients, what is typical for each pair, and how many modules both of
    a pair adapt, all (K, K); sums over modules by `+`.
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
    """One module of K clients of one shape (out, in); None for a client that does not adapt it.

    `levels` are the distinct ranks of the clients, ascending; nothing beyond the last is compared.
    Only levels that `in_units` asks for are kept, so that a client adds one at most to a module,
    however many ranks it has in others. A zero update fills no rank, and is compared at the rank
    that it declares. Where s_m = s_m+1, T_m is one of several.

    >>> one = Factors(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> two = Factors(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> by_level([one, two, None], levels=[1, 2]).distances[-1]
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 0., 0.]])
    """
    ranks = np.zeros(len(updates), dtype=np.int64)
    svds = [(k, _svd(one)) for k, one in enumerate(updates) if one is not None]
    present = [k for k, _ in svds]
    found = [one for _, one in svds]
    ranks[present] = [one.s.numel() for one in found]
    kept = sorted({levels[at] for at in _reached(levels, ranks[present])} | {levels[-1]})
    distances = np.zeros((len(kept), len(updates), len(updates)))
    if found:
        at = np.ix_(range(len(kept)), present, present)
        distances[at] = _distances(found, ranks[present], np.asarray(kept))
    return ByLevel(tuple(kept), distances, ranks)


def _reached(levels: Sequence[int], ranks: IntArray) -> IntArray:
    """The place of the first level that reaches each rank, the last one where none does."""
    return np.searchsorted(levels[:-1], ranks)


def in_units(module: ByLevel) -> Comparison:
    """The distances of one module beside what is typical at the level of each pair.

    The level of a pair is the first that reaches the lower of its two ranks. Typical there is the
    median over the clients that reach the level too, all truncated to it, of their median squared
    distance to each other. Clients at distance 0, the same or with nothing shared, are in no
    median. Attackers make a level's unit larger only where they are half of those that reach it.
    """
    reached = _reached(module.levels, module.ranks)
    adapts = module.ranks > 0
    typical = np.zeros(len(module.levels))
    for level, distances in enumerate(module.distances):
        at = adapts & (reached >= level)
        typical[level] = _median([_median(row) for row in distances[np.ix_(at, at)]])
    shared = np.outer(adapts, adapts).astype(np.float64)
    return Comparison(
        module.distances[-1], shared * typical[np.minimum.outer(reached, reached)], shared
    )


def compare(updates: Sequence[Factors | None], levels: Sequence[int]) -> Comparison:
    """One module of K clients, as `by_level` takes them."""
    return in_units(by_level(updates, levels))


def relative(comparison: Comparison) -> FloatArray:
    """Squared distances in units of what is typical in the modules that a pair shares: (K, K).

    So 0 means the same and 1 as far apart as two clients usually are, at any rank and in however
    few modules. Of a pair that shares none, nothing is known, and 1 is taken. Beyond the range of
    float64, a distance is infinite.

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
    unbounded: FloatArray = np.fmin(units, np.inf)  # what is no number is as far as can be
    return unbounded


def _median(values: Sequence[float] | FloatArray) -> float:
    """The lower median of those above 0; 0 without any. A mean of the middle two would do as the
    larger of them says, which may be an attacker's.
    """
    positive = np.sort([value for value in values if value > 0])
    return float(positive[(positive.size - 1) // 2]) if positive.size else 0.0


def _svd(factors: Factors) -> lowrank.Svd:
    ones = torch.ones(factors.rank, dtype=torch.float64, device=factors.B.device)
    found = lowrank.svd(lowrank.orthogonalize([factors]), ones)[0]
    if found.s.numel():
        return found
    out_features, in_features = factors.shape
    return lowrank.Svd(
        ones.new_zeros(out_features, factors.rank),
        ones.new_zeros(factors.rank),
        ones.new_zeros(factors.rank, in_features),
    )


def _distances(found: Sequence[lowrank.Svd], ranks: IntArray, levels: IntArray) -> FloatArray:
    """Squared distances (L, K, K) of K clients that all have an update.

    ‖T_m(ΔW_k)‖² = sum s_a² and ‹T_m(ΔW_j), T_m(ΔW_k)› = sum s_a s_b (u_aᵀ u_b) (v_aᵀ v_b) over
    directions a, b < m of j and of k: one strip of Gram matrices for each client.
    """
    starts = np.cumsum([0, *ranks])
    index = np.concatenate([np.arange(r) for r in ranks])
    owners = np.repeat(np.arange(len(ranks)), ranks)
    U, V = torch.cat([one.U for one in found], dim=1), torch.cat([one.Vh for one in found])
    s = torch.cat([one.s for one in found])
    inner = np.zeros((len(levels), len(ranks), len(ranks)))
    for j, first in enumerate(starts[:-1]):
        own, later = slice(first, starts[j + 1]), slice(first, None)
        gram = (U[:, own].T @ U[:, later]) * (V[own] @ V[later].T) * torch.outer(s[own], s[later])
        products = gram.cpu().numpy()
        # The largest index of a pair of directions, and whether each is within the other's rank.
        depth = np.maximum.outer(index[own], index[later])
        within = depth < np.minimum(ranks[j], ranks[owners[later]])
        for level, m in enumerate(levels):
            columns = np.where(within & (depth < m), products, 0.0).sum(axis=0)
            inner[level, j, j:] = np.add.reduceat(columns, starts[j:-1] - first)
    inner += np.triu(inner, 1).transpose(0, 2, 1)
    cumulative = np.zeros((len(ranks), ranks.max() + 1))
    for k, one in enumerate(found):
        cumulative[k, 1 : ranks[k] + 1] = one.s.square().cumsum(0).cpu().numpy()
    m = np.minimum(np.minimum.outer(ranks, ranks), levels[:, None, None])
    energies = cumulative[np.arange(len(ranks))[:, None], m]
    both = energies + energies.transpose(0, 2, 1)
    distances = both - 2 * inner
    # What rounding leaves of the difference of equal updates is no distance.
    rounding = np.finfo(np.float64).eps * max(U.shape[0], V.shape[1]) * both
    return np.where(distances > rounding, distances, 0.0)
