"""The contract that every method keeps for being listed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.adapters import relative_error, truncated
from support.plugins import OUTSIDE

from fedlora_cli import METHODS, UsageError, methods, register
from fedlora_cli.linalg import lowrank, merging
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import norm
from fedlora_cli.methods import find
from fedlora_cli.methods.weights import Holdings, coverage

ROWS, COLUMNS = 11, 17
BUILT_IN = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
EVERY = pytest.mark.parametrize("method", [*METHODS, *OUTSIDE])


@pytest.fixture(autouse=True)
def methods_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some registered methods, for all tests here."""
    monkeypatch.setattr(methods, "_REGISTERED", {})
    for method, _ in OUTSIDE.values():
        register(method)


def oracle_name(method: str) -> str:
    """The method of the oracle with the same update before the compression."""
    return OUTSIDE[method][1] if method in OUTSIDE else method


@st.composite
def holdings(draw: st.DrawFn) -> Holdings:
    """Ranks, some of them 0, sample counts, some of them 0, norms and a previous rank."""
    count = draw(st.integers(1, 6))
    ranks = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    samples = draw(st.lists(st.integers(0, 500), min_size=count, max_size=count))
    norms = draw(st.lists(st.floats(0, 1e3), min_size=count, max_size=count))
    norms = [norm if rank else 0.0 for norm, rank in zip(norms, ranks, strict=True)]
    return Holdings(
        np.array(ranks, dtype=np.int64),
        np.array(samples, dtype=np.float64),
        np.array(norms),
        previous_rank=draw(st.integers(0, 12)),
    )


def clients(method: str, ranks: list[int], seed: int = 0) -> list[oracle.Client]:
    """Clients of different ranks, scalings and sample counts; with one A where that is the rule."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(max(ranks), COLUMNS))
    return [
        (
            rng.normal(size=(ROWS, rank)),
            shared[:rank] if method == "ffa" else rng.normal(size=(rank, COLUMNS)),
            float(rng.uniform(0.5, 4)),
            float(rng.integers(1, 300)),
        )
        for rank in ranks
    ]


def run(method: str, given: list[oracle.Client], previous: Factors | None = None) -> np.ndarray:
    """The method on one module, by the public pieces: rule, merge, no truncation. Dense."""
    chosen = find(method)
    terms = [Factors(torch.from_numpy(B), torch.from_numpy(A), s) for B, A, s, _ in given]
    rule = chosen.rule(
        Holdings(
            np.array([term.rank for term in terms]),
            np.array([n for *_, n in given]),
            np.array([norm(term) for term in terms]),
            previous.rank if previous is not None and chosen.uses_previous else 0,
        )
    )
    weights = [
        torch.from_numpy(row[: term.rank].copy())
        for row, term in zip(rule.clients, terms, strict=True)
    ]
    if callable(chosen.merge):
        merged = chosen.merge([lowrank.double(term) for term in terms], weights)
        dense = merged if isinstance(merged, torch.Tensor) else merged.scale * merged.B @ merged.A
        return dense.numpy()
    if chosen.merge != "sum":
        merged = {"average": merging.averaged, "shared": merging.shared}[chosen.merge](
            terms, weights, 1.0
        )
        return (merged.B @ merged.A).numpy()
    if previous is not None and chosen.uses_previous:
        terms.append(lowrank.canonical(previous))
        weights.append(torch.from_numpy(rule.previous[: previous.rank].copy()))
    exact, _ = lowrank.svd(lowrank.orthogonalize(terms), torch.cat(weights))
    return (exact.U * exact.s @ exact.Vh).numpy()


@EVERY
@given(holdings())
def test_weights_are_finite_and_zero_where_a_client_lacks_the_rank(method, given) -> None:
    weights = find(method).rule(given)

    assert weights.clients.shape == (given.ranks.size, given.rank)
    assert weights.previous.shape == (given.rank,)
    assert np.isfinite(weights.clients).all()
    assert np.isfinite(weights.previous).all()
    assert (weights.clients >= 0).all()
    assert (weights.clients[given.held == 0] == 0).all()


@EVERY
@given(holdings(), st.randoms(use_true_random=False))
def test_weights_follow_the_clients_into_any_order(method, given, random) -> None:
    order = list(range(given.ranks.size))
    random.shuffle(order)
    shuffled = Holdings(
        given.ranks[order], given.samples[order], given.norms[order], given.previous_rank
    )

    found, expected = find(method).rule(shuffled), find(method).rule(given)
    np.testing.assert_allclose(found.clients, expected.clients[order], rtol=1e-12)
    np.testing.assert_allclose(found.previous, expected.previous, rtol=1e-12, atol=1e-12)


@EVERY
@settings(max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_method_agrees_with_the_dense_oracle(method, ranks, seed) -> None:
    given = clients(method, ranks, seed)

    expected = oracle.aggregate(oracle_name(method), given)

    assert relative_error(run(method, given), expected) < 1e-12


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if m.uses_previous])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_previous_adapter_is_one_more_term(method, rank) -> None:
    given = clients(method, [2, 3, 5])
    rng = np.random.default_rng(rank)
    B, A = rng.normal(size=(ROWS, rank)), rng.normal(size=(rank, COLUMNS))
    previous = Factors(torch.from_numpy(B), torch.from_numpy(A), 0.7)

    expected = oracle.aggregate(method, given, 0.7 * B @ A)

    assert relative_error(run(method, given, previous), expected) < 1e-12
    # All clients hold the first direction, so the previous one counts nothing; the ninth does.
    alone = relative_error(run(method, given), expected)
    assert alone < 1e-12 if rank == 1 else alone > 1e-3 or (method == "raflora" and rank <= 5)


@EVERY
@pytest.mark.parametrize("rank", [1, 5])
def test_one_client_alone_comes_back_unchanged(method, rank) -> None:
    given = clients(method, [rank])
    B, A, scale, _ = given[0]

    assert relative_error(run(method, given), scale * B @ A) < 1e-12


@EVERY
def test_the_order_of_the_clients_does_not_matter(method) -> None:
    given = clients(method, [2, 7, 4, 4])

    assert relative_error(run(method, given[::-1]), run(method, given)) < 1e-12


@EVERY
def test_basis_free_means_what_it_says(method) -> None:
    """Rotating the rank indices of every client changes the result of the others alone."""
    given = clients(method, [2, 7, 4])
    rng = np.random.default_rng(1)
    rotated = []
    for B, A, s, n in given:
        Q, _ = np.linalg.qr(rng.normal(size=(A.shape[0], A.shape[0])))
        rotated.append((B @ Q, Q.T @ A, s, n))

    if find(method).merge == "shared":
        with pytest.raises(merging.NotShared):
            run(method, rotated)
        assert not find(method).basis_free
    else:
        same = relative_error(run(method, rotated), run(method, given)) < 1e-12
        assert same == find(method).basis_free


@BUILT_IN
def test_every_method_names_its_paper(method) -> None:
    assert method.source.startswith("arXiv:")
    assert METHODS[method.name] is method


def test_an_unknown_method_is_told_its_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown method raflra; did you mean raflora\?"):
        find("raflra")


@given(holdings())
def test_the_columns_of_raflora_sum_to_one_and_those_of_flexlora_to_the_coverage(given) -> None:
    raflora = METHODS["raflora"].rule(given)
    flexlora = METHODS["flexlora"].rule(given)

    held = given.samples @ given.held > 0
    np.testing.assert_allclose(raflora.clients.sum(axis=0)[held], 1.0)
    np.testing.assert_allclose(flexlora.clients.sum(axis=0), coverage(given), atol=1e-15)
    # An index without a holder is the previous adapter's, as far as it has one.
    indices = np.arange(given.rank)
    np.testing.assert_array_equal(
        raflora.previous, np.where(~held & (indices < given.previous_rank), 1.0, 0.0)
    )


@given(holdings())
def test_the_weights_that_rb_lora_publishes_equal_those_of_raflora(given) -> None:
    """RB-LoRA: data share α_k = n_k / N times rank rarity β_i = N / sum of the holders' n."""
    total = given.samples.sum()
    held = given.samples @ given.held
    rarity = np.divide(total, held, out=np.zeros_like(held), where=held > 0)
    share = given.samples / total if total else given.samples

    np.testing.assert_allclose(
        METHODS["raflora"].rule(given).clients, given.held * share[:, None] * rarity, atol=1e-12
    )


def test_with_equal_ranks_raflora_equals_flexlora() -> None:
    given = clients("raflora", [5, 5, 5])

    assert relative_error(run("raflora", given), run("flexlora", given)) < 1e-12


@pytest.mark.parametrize("quorum", [0.0, 0.3, 1.0])
def test_a_quorum_bounds_what_one_high_rank_client_does(quorum) -> None:
    """One client in a hundred declares a high rank: q bounds its weight there by 1 / (q K)."""
    given = Holdings(np.array([8] * 99 + [64]), np.ones(100), np.ones(100))
    with_quorum = METHODS["raflora"].with_quorum
    assert with_quorum is not None

    top = with_quorum(quorum)(given).clients[-1, -1]

    assert top == pytest.approx(1.0 if quorum == 0 else 1 / (quorum * 100))


def test_a_fixed_basis_shows_the_collapse_and_its_rate() -> None:
    """Without training, flexlora multiplies energy i by c_i² each round; raflora keeps it."""
    ranks, samples = np.array([8] * 4 + [16] * 3 + [32] * 2 + [64]), np.ones(10)
    given = Holdings(ranks, samples, np.ones(10))
    above = {}
    for name in ("flexlora", "raflora"):
        s = np.ones(64)
        series = []
        for _ in range(30):
            s = s * METHODS[name].rule(given).clients.sum(axis=0)
            series.append(1 - (s[:8] ** 2).sum() / (s**2).sum())
        above[name] = np.array(series)

    gamma = (coverage(given)[8:] ** 2).max()
    assert above["flexlora"][-1] / above["flexlora"][-2] == pytest.approx(gamma, rel=1e-3)
    np.testing.assert_allclose(above["raflora"], 56 / 64)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_best_of_its_rank(rank) -> None:
    given = clients("flexlora", [3, 6, 4])
    terms = [Factors(torch.from_numpy(B), torch.from_numpy(A), s) for B, A, s, _ in given]
    weights = torch.cat(
        [
            torch.full((t.rank,), n, dtype=torch.float64)
            for t, (*_, n) in zip(terms, given, strict=True)
        ]
    )

    best, s = lowrank.svd(lowrank.orthogonalize(terms), weights, rank)

    dense = sum(n * scale * B @ A for B, A, scale, n in given)
    assert relative_error((best.U * best.s @ best.Vh).numpy(), truncated(dense, rank)) < 1e-10
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(dense)[1][: s.numel()], rtol=1e-10)
