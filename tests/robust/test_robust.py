"""Bounds on a client: capped weights, distances across ranks, rules of trust, the clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_cli.linalg.factors import Factors
from fedlora_cli.methods.weights import FloatArray, IntArray, Weights, capped
from fedlora_cli.robust.distances import ByLevel, by_level, compare, in_units, relative
from fedlora_cli.robust.trust import (
    FAR,
    SMOOTHING,
    clip_factors,
    clip_limit,
    geometric_median,
    multi_krum,
)

OUT, IN = 40, 36
RANKS = (4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32)
F = 2
ONES = np.ones(len(RANKS))


# --- capped weights -------------------------------------------------------------------------------


@st.composite
def columns(draw: st.DrawFn) -> tuple[Weights, float, int]:
    """Weights whose columns sum to at most 1, some of them zero, a limit and a previous rank."""
    K, R = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    entries = st.one_of(st.just(0.0), st.sampled_from([0.25, 0.5]), st.floats(1e-6, 1.0))
    clients = np.array(draw(st.lists(entries, min_size=K * R, max_size=K * R))).reshape(K, R)
    clients /= np.maximum(clients.sum(axis=0), 1.0)
    limit = draw(st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0.01, 1.0)))
    return Weights(clients, 1.0 - clients.sum(axis=0)), limit, draw(st.integers(0, R))


@given(columns())
def test_capped_weights_stay_below_the_limit_and_keep_what_can_be_kept(
    case: tuple[Weights, float, int],
) -> None:
    weights, limit, previous_rank = case
    result = capped(weights, limit, previous_rank)
    before, after = weights.clients.sum(axis=0), result.clients.sum(axis=0)
    room = limit * (weights.clients > 0).sum(axis=0)
    holds = np.arange(before.size) < previous_rank

    assert (result.clients <= limit).all()
    assert (result.clients[weights.clients == 0] == 0).all()
    np.testing.assert_allclose(after, np.minimum(before, room), rtol=1e-12)
    given_on = result.previous - weights.previous
    np.testing.assert_allclose(given_on, np.where(holds, before - after, 0.0), atol=1e-12)
    untouched = (weights.clients <= limit).all(axis=0)
    assert np.array_equal(result.clients[:, untouched], weights.clients[:, untouched])
    assert np.array_equal(result.previous[untouched], weights.previous[untouched])


@given(columns(), st.randoms())
def test_capped_weights_do_not_depend_on_the_order_of_the_clients(
    case: tuple[Weights, float, int], random: Random
) -> None:
    weights, limit, previous_rank = case
    order = list(range(len(weights.clients)))
    random.shuffle(order)
    moved = capped(Weights(weights.clients[order], weights.previous), limit, previous_rank)

    result = capped(weights, limit, previous_rank)
    assert np.array_equal(moved.clients, result.clients[order])
    assert np.array_equal(moved.previous, result.previous)


@given(columns())
def test_weights_below_the_limit_grow_by_the_same_factor(case: tuple[Weights, float, int]) -> None:
    weights, limit, _ = case
    result = capped(weights, limit).clients
    for before, after in zip(weights.clients.T, result.T, strict=True):
        lifted = after[(before > 0) & (after < limit)] / before[(before > 0) & (after < limit)]
        np.testing.assert_allclose(lifted, lifted.max(initial=1.0), rtol=1e-9)
        assert (lifted >= 1 - 1e-12).all()


# --- distances ------------------------------------------------------------------------------------


def factors(matrix: FloatArray, rank: int, rng: np.random.Generator | None = None) -> Factors:
    """The truncated SVD of a dense matrix, in a random basis if there is a generator."""
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    B, A = U[:, :rank] * s[:rank], Vh[:rank]
    if rng is not None:
        Q = rng.standard_normal((rank, rank)) + 3 * np.eye(rank)
        B, A = B @ Q, np.linalg.solve(Q, A)
    return Factors(torch.from_numpy(B.copy()) / 2, torch.from_numpy(A.copy()), scale=2.0)


def dense(one: Factors) -> FloatArray:
    return np.asarray((one.scale * one.B @ one.A).numpy())


def truncated(matrix: FloatArray, rank: int) -> FloatArray:
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    result: FloatArray = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    return result


def test_distances_are_those_of_the_dense_truncations() -> None:
    rng = np.random.default_rng(0)
    ranks, levels = [2, 5, 3, 5, 0], [2, 3, 5]
    matrices = [truncated(rng.standard_normal((9, 7)), r) for r in ranks]
    updates = [factors(one, r, rng) if r else None for one, r in zip(matrices, ranks, strict=True)]
    found = by_level(updates, levels)

    for at, level in enumerate(levels):
        for j, one in enumerate(matrices):
            for k, other in enumerate(matrices):
                m = min(ranks[j], ranks[k], level)
                expected = np.square(truncated(one, m) - truncated(other, m)).sum()
                assert found.distances[at, j, k] == pytest.approx(expected, rel=1e-12, abs=1e-30)
    assert found.ranks.tolist() == ranks
    assert np.array_equal(found.distances, found.distances.transpose(0, 2, 1))


def test_basis_and_unfilled_rank_do_not_change_a_distance() -> None:
    rng = np.random.default_rng(1)
    matrices = [truncated(rng.standard_normal((9, 7)), r) for r in (2, 4, 4)]
    plain = [factors(one, r) for one, r in zip(matrices, (2, 4, 4), strict=True)]
    # The same updates, the first declared at rank 4: two columns of B are zero.
    B, A = torch.zeros(9, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    first = factors(matrices[0], 2, rng)
    B[:, :2], A[:2] = first.B, first.A
    disguised = [Factors(B, A, first.scale), *(factors(one, 4, rng) for one in matrices[1:])]

    expected, found = by_level(plain, [2, 4]), by_level(disguised, [2, 4])
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-10)
    assert np.array_equal(found.ranks, expected.ranks)


def test_equal_updates_in_two_bases_have_distance_zero() -> None:
    rng = np.random.default_rng(2)
    matrix = 1e6 * rng.standard_normal((9, 7))

    assert not by_level([factors(matrix, 3), factors(matrix, 3, rng)], [3]).distances.any()


def test_a_zero_update_is_compared_and_a_missing_module_is_not() -> None:
    rng = np.random.default_rng(3)
    one, two = (factors(rng.standard_normal((9, 7)), 3) for _ in range(2))
    zero = Factors(torch.zeros(9, 3, dtype=torch.float64), one.A)
    found = by_level([one, zero, None, two], [3])

    assert found.ranks.tolist() == [3, 3, 0, 3]
    assert not found.distances[:, 2].any()
    energies = [np.square(dense(each)).sum() for each in (one, two)]
    np.testing.assert_allclose(found.distances[0, 1], [energies[0], 0.0, 0.0, energies[1]])
    nobody = relative(compare([zero, None, zero], [3]))
    assert nobody.tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_comparisons_add_up_over_modules() -> None:
    rng = np.random.default_rng(4)
    first = compare([factors(rng.standard_normal((9, 7)), r) for r in (2, 3)], [2, 3])
    second = compare([factors(rng.standard_normal((5, 6)), r) for r in (3, 2)], [2, 3])
    total = first + second

    assert np.array_equal(total.distances, first.distances + second.distances)
    assert np.array_equal(total.typical, first.typical + second.typical)
    assert (total.shared == 2).all()


@settings(max_examples=20)
@given(st.permutations(range(6)))
def test_relative_distances_move_with_the_clients(order: list[int]) -> None:
    rng = np.random.default_rng(5)
    ranks = [2, 3, 3, 4, 4, 4]
    updates = [factors(rng.standard_normal((9, 7)), r) for r in ranks]
    expected = relative(compare(updates, [2, 3, 4]))

    found = relative(compare([updates[k] for k in order], [2, 3, 4]))
    np.testing.assert_allclose(found, expected[np.ix_(order, order)], rtol=1e-12)


def test_relative_distances_have_no_unit() -> None:
    rng = np.random.default_rng(6)
    updates = [factors(rng.standard_normal((9, 7)), r) for r in (2, 2, 3, 3)]
    tiny = [Factors(one.B * 1e-30, one.A, one.scale) for one in updates]

    expected = relative(compare(updates, [2, 3]))
    np.testing.assert_allclose(relative(compare(tiny, [2, 3])), expected, rtol=1e-12)


def test_a_minority_of_a_level_does_not_raise_its_typical_distance() -> None:
    rng = np.random.default_rng(7)
    honest = [factors(rng.standard_normal((9, 7)), 4) for _ in range(3)]
    bad = [Factors(one.B * 1e3, one.A, one.scale) for one in honest[:2]]
    # Seven more that do not reach the level: their number must not matter.
    low = [factors(rng.standard_normal((9, 7)), 1) for _ in range(7)]
    found = relative(compare([*honest, *bad, *low], [1, 4]))

    assert found[:3, :3].max() < 3
    assert found[:3, 3:5].min() > 1e5


def test_an_overflow_is_an_infinite_distance() -> None:
    distances = np.array([[0.0, 1.0, np.inf], [1.0, 0.0, np.nan], [np.inf, np.nan, 0.0]])
    distances[:2, :2] *= 1e-300
    found = relative(in_units(ByLevel((4,), distances[None], np.array([4, 4, 4]))))

    assert not np.isnan(found).any()
    assert (found[2, :2] >= 1).all()
    far = np.full((5, 5), 1e-300) * (1 - np.eye(5))
    far[4, :4] = far[:4, 4] = 1e300
    assert relative(in_units(ByLevel((4,), far[None], np.full(5, 4))))[4, 0] == np.inf


# --- cohorts --------------------------------------------------------------------------------------


def cohort(seed: int, ranks: Sequence[int] = RANKS) -> list[Factors]:
    """Honest clients: truncations of one signal, σ_i ∝ 1/i and norm 1, plus own noise, norm 0.6."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((OUT, IN)))
    V, _ = np.linalg.qr(rng.standard_normal((IN, IN)))
    s = 1.0 / np.arange(1, IN + 1)
    signal = U * (s / np.linalg.norm(s)) @ V.T
    noise = 0.6 / np.sqrt(OUT * IN)
    return [factors(signal + noise * rng.standard_normal((OUT, IN)), r) for r in ranks]


def apart(clients: Sequence[Factors]) -> FloatArray:
    return relative(compare(clients, sorted({one.rank for one in clients})))


def plainly_apart(clients: Sequence[Factors]) -> FloatArray:
    flat = np.stack([dense(one).ravel() for one in clients])
    squared: FloatArray = np.square(flat[:, None] - flat).sum(axis=-1)
    return squared


def by_rank(values: FloatArray) -> dict[int, float]:
    """The mean over cohorts (axis 0) and over the clients of each rank."""
    return {r: float(values[:, np.array(RANKS) == r].mean()) for r in sorted(set(RANKS))}


@pytest.fixture(scope="module")
def cohorts() -> list[list[Factors]]:
    return [cohort(seed) for seed in range(80)]


@pytest.fixture(scope="module")
def honest(cohorts: list[list[Factors]]) -> list[FloatArray]:
    return [apart(one) for one in cohorts]


def test_multi_krum_excludes_honest_clients_of_all_ranks_alike(
    cohorts: list[list[Factors]], honest: list[FloatArray]
) -> None:
    excluded = by_rank(np.array([1 - multi_krum(one, ONES, F) for one in honest]))
    plainly = by_rank(np.array([1 - multi_krum(plainly_apart(one), ONES, F) for one in cohorts]))

    share = F / len(RANKS)
    assert all(share / 2 < one < share * 1.75 for one in excluded.values()), excluded
    # The plain distances tell ranks apart: they exclude nobody but clients of the highest rank.
    assert plainly == pytest.approx({4: 0.0, 8: 0.0, 16: 0.0, 32: 4 * share})


def test_the_geometric_median_trusts_honest_clients_of_all_ranks_alike(
    honest: list[FloatArray],
) -> None:
    trust = np.array([geometric_median(one, ONES) for one in honest])

    assert trust.min() > 0.6
    assert all(one > 0.9 for one in by_rank(trust).values()), by_rank(trust)


def scaled(one: Factors, factor: float) -> Factors:
    return Factors(one.B * factor, one.A, one.scale)


def noise(rng: np.random.Generator, rank: int, like: Factors) -> Factors:
    """A random update of a given rank, with the norm of another update."""
    one = factors(rng.standard_normal((OUT, IN)), rank)
    return scaled(one, float(np.linalg.norm(dense(like)) / np.linalg.norm(dense(one))))


Attack = Callable[[list[Factors], IntArray, np.random.Generator], list[Factors]]

ATTACKS: dict[str, Attack] = {
    "sign flip": lambda clients, who, rng: [scaled(clients[k], -1.0) for k in who],
    "three times as large": lambda clients, who, rng: [scaled(clients[k], 3.0) for k in who],
    "a thousand times as large": lambda clients, who, rng: [scaled(clients[k], 1e3) for k in who],
    "noise of the same rank": lambda clients, who, rng: [
        noise(rng, clients[k].rank, clients[k]) for k in who
    ],
    "noise of huge rank": lambda clients, who, rng: [noise(rng, IN, clients[k]) for k in who],
    "the same noise of huge rank": lambda clients, who, rng: (
        [noise(rng, IN, clients[who[0]])] * len(who)
    ),
    "sign flip at rank 1": lambda clients, who, rng: [
        Factors(-clients[k].B[:, :1], clients[k].A[:1], clients[k].scale) for k in who
    ],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_f_attackers_are_excluded_and_hardly_trusted_in_every_cohort(
    attack: str, cohorts: list[list[Factors]]
) -> None:
    for seed, honest in enumerate(cohorts[:20]):
        rng = np.random.default_rng(seed)
        who = rng.choice(len(RANKS), F, replace=False)
        clients = list(honest)
        for k, bad in zip(who, ATTACKS[attack](honest, who, rng), strict=True):
            clients[k] = bad
        distances = apart(clients)
        trust = geometric_median(distances, ONES)
        others = np.delete(trust, who)

        assert not multi_krum(distances, ONES, F)[who].any()
        assert others.min() > 0.4
        assert trust[who].max() < 0.75 * others.min()
        # However large an attacker is, its pull is that of a few clients.
        norms = np.array([np.linalg.norm(dense(clients[k])) for k in who])
        assert (trust[who] * norms).max() < 2.0


# --- rules ----------------------------------------------------------------------------------------


def points(rng: np.random.Generator, n: int, dimensions: int = 30) -> tuple[FloatArray, FloatArray]:
    """Points whose typical distance is 1, and their squared distances."""
    x = rng.standard_normal((n, dimensions)) / np.sqrt(2 * dimensions)
    return x, np.square(x[:, None] - x).sum(axis=-1)


@pytest.mark.parametrize(("n", "f"), [(4, 1), (6, 2), (2, 0), (5, -1)])
def test_multi_krum_refuses_too_many_attackers(n: int, f: int) -> None:
    with pytest.raises(ValueError, match=r"n >= 2 f \+ 3"):
        multi_krum(np.zeros((n, n)), np.ones(n), f)


def test_multi_krum_scores_by_the_nearest_and_takes_the_first_of_equal_scores() -> None:
    assert multi_krum(np.zeros((5, 5)), np.ones(5), f=1).tolist() == [1, 1, 1, 1, 0]
    rng = np.random.default_rng(0)
    _, distances = points(rng, 9)
    scores = [sum(sorted(np.delete(distances[k], k))[: 9 - 3 - 2]) for k in range(9)]
    best = sorted(range(9), key=lambda k: scores[k])[:6]

    assert np.flatnonzero(multi_krum(distances, np.ones(9), f=3)).tolist() == sorted(best)


def test_samples_times_trust_are_the_weights_of_the_geometric_median() -> None:
    rng = np.random.default_rng(1)
    x, distances = points(rng, 8)
    x[7] += 0.3
    distances = np.square(x[:, None] - x).sum(axis=-1)
    samples = rng.uniform(1, 5, 8)

    def away(v: FloatArray) -> FloatArray:
        norms: FloatArray = np.maximum(np.linalg.norm(x - v, axis=1), SMOOTHING)
        return norms

    v = samples @ x / samples.sum()
    for _ in range(500):
        v = (samples / away(v)) @ x / (samples / away(v)).sum()
    weights = samples * geometric_median(distances, samples)
    np.testing.assert_allclose(weights @ x / weights.sum(), v, atol=1e-4)
    expected = samples * away(v).min() / away(v)
    np.testing.assert_allclose(weights, expected, rtol=1e-3)


@given(st.permutations(range(7)))
def test_the_geometric_median_does_not_depend_on_the_order_of_the_clients(order: list[int]) -> None:
    _, distances = points(np.random.default_rng(2), 7)
    samples = np.arange(1.0, 8.0)
    found = geometric_median(distances[np.ix_(order, order)], samples[order])

    np.testing.assert_allclose(found, geometric_median(distances, samples)[order], rtol=1e-9)


@given(st.floats(FAR, 1e12))
def test_the_trust_in_an_outlier_falls_as_its_distance_grows(distance: float) -> None:
    distances = 1.0 - np.eye(9)
    distances[8, :8] = distances[:8, 8] = distance**2
    trust = geometric_median(distances, np.ones(9))

    assert trust[:8] == pytest.approx(1.0)
    assert trust[8] * distance < 1.0


def test_the_geometric_median_of_clients_without_samples_or_company() -> None:
    _, distances = points(np.random.default_rng(3), 5)
    even = geometric_median(distances, np.ones(5))

    np.testing.assert_allclose(geometric_median(distances, np.zeros(5)), even)
    assert geometric_median(np.zeros((1, 1)), np.ones(1)).tolist() == [1.0]
    assert geometric_median(np.zeros((4, 4)), np.ones(4)).tolist() == [1.0] * 4
    # Distances that no points have: clamped, not an error.
    assert geometric_median(np.array([[0, 9, 0], [9, 0, 0], [0, 0, 0.0]]), np.ones(3))[2] == 1.0


# --- clip -----------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1e300)), min_size=1), st.floats(1e-3, 1e3)
)
def test_clipped_norms_reach_the_limit_and_no_further(norms: list[float], limit: float) -> None:
    before = np.array(norms)
    factors = clip_factors(before, limit)

    np.testing.assert_allclose(before * factors, np.minimum(before, limit), rtol=1e-12)
    assert (factors[before <= limit] == 1.0).all()


def test_the_limit_is_twice_the_median_of_the_nonzero_norms() -> None:
    assert clip_limit(np.array([0.0, 0.0, 1.0, 2.0, 1e9])) == 4.0
    assert clip_limit(np.zeros(3)) == 0.0
    assert clip_factors(np.zeros(3), clip_limit(np.zeros(3))).tolist() == [1.0] * 3


def test_a_client_with_few_modules_is_judged_by_these() -> None:
    """A client sends one module of four, with a flipped sign."""
    rng = np.random.default_rng(11)
    signal = [rng.standard_normal((9, 7)) for _ in range(4)]
    honest = [
        [factors(one + 0.5 * rng.standard_normal((9, 7)), 3) for one in signal] for _ in range(8)
    ]
    total = None
    for module, one in enumerate(signal):
        flipped = factors(-one, 3) if module == 0 else None
        found = compare([*(client[module] for client in honest), flipped], [3])
        total = found if total is None else total + found
    assert total is not None

    assert multi_krum(relative(total), np.ones(9), f=1).tolist() == [1.0] * 8 + [0.0]
    assert geometric_median(relative(total), np.ones(9))[-1] < 0.6


def every_level(updates: list[Factors | None], levels: list[int]) -> FloatArray:
    """Relative distances by definition: a dense truncation at every level."""
    matrices = [None if one is None else dense(one) for one in updates]
    ranks = np.array([0 if one is None else one.rank for one in updates])
    at = np.array(
        [min((level for level in levels if level >= r), default=levels[-1]) for r in ranks]
    )
    size = len(updates)

    def distance(j: int, k: int, level: int) -> float:
        m = min(ranks[j], ranks[k], level)
        return float(np.square(truncated(matrices[j], m) - truncated(matrices[k], m)).sum())

    def lower_median(values: list[float]) -> float:
        positive = sorted(value for value in values if value > 0)
        return positive[(len(positive) - 1) // 2] if positive else 0.0

    result = np.ones((size, size))
    typical = {}
    for level in levels:
        own = [k for k in range(size) if ranks[k] and at[k] >= level]
        rows = [[distance(j, k, level) for k in own if k != j] for j in own]
        typical[level] = lower_median([lower_median(row) for row in rows])
    for j in range(size):
        for k in range(size):
            if ranks[j] and ranks[k] and j != k:
                unit = typical[min(at[j], at[k])]
                result[j, k] = distance(j, k, levels[-1]) / unit if unit else 0.0
        result[j, j] = 0.0
    return result


@pytest.mark.parametrize(
    ("ranks", "levels"),
    [
        ([2, 2, 3, 3, 5], [2, 3, 5]),
        ([4, 4, 4, 4], [4]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ([2, 0, 3, 3, 0], [2, 3]),
        ([3, 3, 4, 6, 6], [2, 4, 5, 6]),  # ranks of other modules among the levels
        ([3, 3, 4], list(range(1, 600))),  # and very many of them
        ([0, 0], [2, 4]),
    ],
)
def test_levels_that_no_pair_needs_change_nothing(ranks: list[int], levels: list[int]) -> None:
    rng = np.random.default_rng(8)
    updates = [factors(rng.standard_normal((9, 7)), r, rng) if r else None for r in ranks]

    found = relative(compare(updates, levels))
    np.testing.assert_allclose(found, every_level(updates, levels), rtol=1e-9)
    assert set(by_level(updates, levels).levels) <= {*levels}


@pytest.mark.parametrize("others", [10, 100, 600])
def test_ranks_of_other_modules_add_no_levels(others: int) -> None:
    """A client with hundreds of ranks does not cause hundreds of comparisons."""
    rng = np.random.default_rng(9)
    updates = [factors(rng.standard_normal((9, 7)), r) for r in (2, 4, 4, 4, 5)]
    found = by_level(updates, list(range(1, others + 1)))

    assert found.levels == (2, 4, 5, others)
    assert found.distances.shape == (4, 5, 5)
