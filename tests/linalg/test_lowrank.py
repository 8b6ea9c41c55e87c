"""The algebra against dense float64 matrices, on shapes that are not square."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.adapters import relative_error

from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import norm


def random_factors(
    rows: int, columns: int, rank: int, scale: float = 1.0, seed: int = 0
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return Factors(B, A, scale)


def dense(factors: Factors) -> np.ndarray:
    return factors.scale * (factors.B.double() @ factors.A.double()).numpy()


sizes = st.integers(1, 24)


@given(sizes, sizes, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_the_svd_of_a_weighted_sum_is_the_dense_one(rows, columns, ranks, seed) -> None:
    terms = [random_factors(rows, columns, r, 0.5 + k, seed + k) for k, r in enumerate(ranks)]
    weights = torch.rand(
        sum(ranks), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    expected = sum(
        dense(Factors(term.B * weight, term.A, term.scale))
        for term, weight in zip(terms, weights.split(ranks), strict=True)
    )

    exact, s = lowrank.svd(lowrank.orthogonalize(terms), weights)

    values = np.linalg.svd(expected)[1]
    np.testing.assert_allclose(s.numpy(), values[: s.numel()], atol=1e-12 * values[0])
    np.testing.assert_array_less(values[s.numel() :], 1e-10 * values[0])
    assert relative_error((exact.U * exact.s @ exact.Vh).numpy(), expected) < 1e-12
    identity = np.eye(s.numel())
    np.testing.assert_allclose((exact.U.T @ exact.U).numpy(), identity, atol=1e-12)
    np.testing.assert_allclose((exact.Vh @ exact.Vh.T).numpy(), identity, atol=1e-12)
    largest = exact.U.abs().argmax(dim=0)
    assert (exact.U[largest, torch.arange(s.numel())] > 0).all()


def test_no_out_by_in_matrix_is_formed_where_factors_do() -> None:
    """At 3000 × 5000 no tensor on the way comes near 15 million numbers."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            sizes = [output.numel() for output in outputs if isinstance(output, torch.Tensor)]
            largest = max([largest, *sizes])
            return result

    terms = [random_factors(3000, 5000, rank, seed=rank) for rank in (4, 8, 20)]
    weights = torch.ones(32, dtype=torch.float64)
    with Watch():
        prepared = lowrank.orthogonalize(terms)
        best, _ = lowrank.svd(prepared, weights, rank=8)
        stored = lowrank.pad(lowrank.split(best, "balanced", 2.0), 20, seed=1)
        lowrank.singular_values(prepared, weights)
        norm(stored)
        lowrank.canonical(terms[0])
        lowrank.outside(terms, weights, stored)
        lowrank.distance(terms, weights, stored)

    assert 0 < largest <= 5000 * 64


@pytest.mark.parametrize("ranks", [[2, 3], [6, 6, 6]], ids=["through the core", "dense"])
def test_both_routes_survive_factors_of_very_different_size(ranks: list[int]) -> None:
    """(B t, A / t) is the same update; no route may lose digits over it."""
    terms = [random_factors(9, 14, rank, seed=k) for k, rank in enumerate(ranks)]
    skewed = [
        Factors(term.B * t, term.A / t, term.scale)
        for term, t in zip(terms, [1e9, 1e-9, 1e6], strict=False)
    ]
    weights = torch.ones(sum(ranks), dtype=torch.float64)

    exact, _ = lowrank.svd(lowrank.orthogonalize(skewed), weights)

    expected = sum(dense(term) for term in terms)
    assert relative_error((exact.U * exact.s @ exact.Vh).numpy(), expected) < 1e-12


@given(sizes, sizes, st.integers(1, 9), st.floats(0.01, 100))
def test_the_norm_is_the_dense_one(rows, columns, rank, scale) -> None:
    factors = random_factors(rows, columns, rank, scale)

    assert norm(factors) == pytest.approx(np.linalg.norm(dense(factors)))


@given(sizes, sizes, st.integers(1, 9))
def test_the_canonical_form_is_the_same_update_ordered_by_energy(rows, columns, rank) -> None:
    factors = random_factors(rows, columns, rank, scale=3.0)

    ordered = lowrank.canonical(factors)

    assert (ordered.rank, ordered.scale) == (rank, 3.0)
    assert relative_error(dense(ordered), dense(factors)) < 1e-12
    s = np.linalg.svd(dense(factors))[1]
    energies = [
        np.linalg.norm(dense(Factors(ordered.B[:, [i]], ordered.A[[i]], 3.0))) for i in range(rank)
    ]
    np.testing.assert_allclose(energies[: s.size], s[:rank], atol=1e-12 * s[0])


@pytest.mark.parametrize("rank", [3, 8])
def test_distance_and_outside_see_an_error_of_any_size(rank: int) -> None:
    terms = [random_factors(30, 20, 3, seed=1), random_factors(30, 20, 4, scale=2.0, seed=2)]
    weights = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    best, s = lowrank.svd(lowrank.orthogonalize(terms), weights, rank)
    exact = lowrank.pad(lowrank.split(best, "left", 1.5), 9, seed=0)
    norm = float(torch.linalg.vector_norm(s))
    lost = float(torch.linalg.vector_norm(s[rank:]))
    ones = torch.ones(exact.rank, dtype=torch.float64)

    assert lowrank.distance(terms, weights, exact) == pytest.approx(lost, abs=1e-12 * norm)
    assert lowrank.outside(terms, weights, exact) == pytest.approx(lost, abs=1e-12 * norm)
    for size in (1e-2, 1e-6, 1e-10):
        A = exact.A.clone()
        A[0] += size * torch.ones(20) / 20**0.5
        wrong = Factors(exact.B, A, exact.scale)
        moved = size * float(torch.linalg.vector_norm(exact.B[:, 0])) * exact.scale
        assert lowrank.distance([exact], ones, wrong) == pytest.approx(moved, rel=1e-3)
    # With one direction exchanged for another, B's columns hold less of the sum.
    turned = Factors(exact.B.roll(1, dims=0), exact.A, exact.scale)
    assert lowrank.outside(terms, weights, turned) > lost + 1e-3 * norm


def test_padding_depends_on_the_seed_alone() -> None:
    factors = random_factors(5, 7, 2)

    one, same, other = (lowrank.pad(factors, 4, seed) for seed in (1, 1, 2))

    assert torch.equal(one.A, same.A)
    assert not torch.equal(one.A, other.A)
    assert torch.equal(lowrank.pad(factors, 2, 1).A, factors.A)
