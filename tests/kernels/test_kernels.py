"""Every route against the dense SVD in float64, and against its measured residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora_cli.kernels import concatenation, dense, eigen, factored, gram, subspace
from fedlora_cli.kernels.leading import TOLERANCES, Leading, Unresolved, orthonormal
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors

Route = Callable[[Sequence[Factors], Tensor, int, str], Leading]


def by_gram(terms: Sequence[Factors], weights: Tensor, rank: int, dtype: str) -> Leading:
    return gram.leading(gram.prepare(terms, dtype), weights, rank)


def by_dense(terms: Sequence[Factors], weights: Tensor, rank: int, dtype: str) -> Leading:
    parts = torch.split(weights, [term.rank for term in terms])
    stream = (dense.Term(*pair) for pair in zip(terms, parts, strict=True))
    working = torch.float32 if dtype.endswith("16") else torch.float64
    whole, _ = dense.accumulate(stream, terms[0].shape, working)
    return dense.leading(whole, rank, dtype)


def by_factored(terms: Sequence[Factors], weights: Tensor, rank: int, dtype: str) -> Leading:
    return factored.leading(factored.prepare(terms, dtype), weights, rank, dtype)


ROUTES = {"gram": by_gram, "dense": by_dense, "factored": by_factored}
routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


@pytest.fixture(autouse=True, scope="module")
def _one_core() -> Iterator[None]:
    """One thread, as in the engine; tiny tensors are faster that way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def iterating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small modules iterate as large modules do."""
    monkeypatch.setattr(subspace, "SMALL", 0)


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some(shape: tuple[int, int], ranks: Sequence[int], seed: int = 0) -> list[Factors]:
    rows, columns = shape
    return [
        Factors(random(seed + 2 * k, rows, r), random(seed + 2 * k + 1, r, columns), 0.5 + k)
        for k, r in enumerate(ranks)
    ]


def alike(shape: tuple[int, int], ranks: Sequence[int], apart: float) -> list[Factors]:
    """Clients whose factors differ by the share `apart` of their size."""
    rank = max(ranks)
    B, A = random(90, shape[0], rank), random(91, rank, shape[1])
    own = some(shape, ranks)
    return [Factors(B[:, : t.rank] + apart * t.B, A[: t.rank] + apart * t.A, 2.0) for t in own]


def graded(shape: tuple[int, int], rank: int, decades: float) -> Factors:
    """An update whose singular values fall evenly over that many decades."""
    U, V = (torch.linalg.qr(random(seed, side, rank))[0] for seed, side in enumerate(shape))
    root = torch.logspace(0, -decades / 2, rank, dtype=torch.float64)
    return Factors(U * root, (V * root).T, 1.0)


def cast(terms: Sequence[Factors], dtype: torch.dtype) -> list[Factors]:
    return [Factors(term.B.to(dtype), term.A.to(dtype), term.scale) for term in terms]


def even(terms: Sequence[Factors]) -> Tensor:
    """Weights with small differences."""
    return torch.linspace(0.5, 1, sum(term.rank for term in terms), dtype=torch.float64)


def summed(terms: Sequence[Factors], weights: Tensor) -> np.ndarray:
    parts = torch.split(weights, [term.rank for term in terms])
    pairs = zip(terms, parts, strict=True)
    return sum(t.scale * (t.B.double() * w @ t.A.double()) for t, w in pairs).numpy()


def check(found: Leading, update: np.ndarray, rank: int, tolerance: float) -> None:
    """Asserts the best approximation within `tolerance`, and all fields of the result."""
    norm = np.linalg.norm(update)
    allowed = 1.5 * tolerance * norm
    s = np.linalg.svd(update)[1]
    U, V, kept = found.U.double().numpy(), found.Vh.double().numpy().T, found.s.numpy()
    assert kept.size <= rank
    np.testing.assert_allclose(kept, s[: kept.size], atol=allowed)
    if kept.size < min(rank, s.size):
        assert s[kept.size] <= allowed
    for basis in (U, V):
        np.testing.assert_allclose(basis.T @ basis, np.eye(kept.size), atol=1e-6)
    residuals = [np.linalg.norm(update.T @ U - V * kept), np.linalg.norm(update @ V - U * kept)]
    assert max(residuals) <= allowed
    assert found.residual <= tolerance * norm
    best = np.linalg.norm(s[kept.size :])
    assert abs(np.linalg.norm(update - (U * kept) @ V.T) - best) <= 2 * allowed
    assert math.isclose(found.energy, norm**2, rel_tol=2 * tolerance)
    assert abs(found.energy - np.square(kept).sum() - best**2) <= 4 * tolerance * norm**2
    assert (U[np.abs(U).argmax(axis=0), range(kept.size)] > 0).all()


@routes
@dtypes
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (50, 50)], ids=str)
def test_a_weighted_sum_of_mixed_ranks_and_scales(route: Route, dtype: str, shape) -> None:
    terms = cast(some(shape, [2, 7, 1, 12]), torch.bfloat16)

    found = route(terms, even(terms), 6, dtype)

    check(found, summed(terms, even(terms)), 6, TOLERANCES[dtype])


@pytest.mark.usefixtures("iterating")
@routes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(60, 120), (120, 60)], ids=str)
def test_iterations_find_the_same_directions(route: Route, dtype: str, shape) -> None:
    terms = [graded(shape, 30, 1.5), *alike(shape, [3, 5, 8], apart=0.1)]

    found = route(terms, even(terms), 5, dtype)

    check(found, summed(terms, even(terms)), 5, TOLERANCES[dtype])
    stack, _ = lowrank.svd(lowrank.orthogonalize(terms), even(terms), 5)
    ours, exact = (U[:, 0].double() for U in (found.U, stack.U))
    torch.testing.assert_close(ours, exact, atol=1e-3 if dtype == "bfloat16" else 1e-5, rtol=0)


@routes
@pytest.mark.parametrize("apart", [1e-1, 1e-3])
def test_nearly_parallel_clients(route: Route, apart: float) -> None:
    terms = alike((40, 60), [4, 4, 8, 8], apart)

    found = route(terms, even(terms), 8, "float32")

    check(found, summed(terms, even(terms)), 8, TOLERANCES["float32"])


@routes
@pytest.mark.parametrize("decades", [4, 12])
def test_spectra_over_many_decades_are_exact_or_unresolved(route: Route, decades: int) -> None:
    terms = [graded((50, 70), 20, decades), graded((50, 70), 20, decades)]
    weights = even(terms)
    try:
        found = route(terms, weights, 20, "float32")
    except Unresolved:
        assert (route, decades) == (by_gram, 12)
    else:
        check(found, summed(terms, weights), 20, TOLERANCES["float32"])


@routes
def test_the_scale_between_the_factors_does_not_matter(route: Route) -> None:
    """(B t, A / t) is the same update."""
    terms = some((40, 60), [3, 5, 7])
    skewed = [
        Factors(term.B * t, term.A / t, term.scale)
        for term, t in zip(terms, [1e9, 1e-9, 1e6], strict=True)
    ]

    found = route(skewed, even(terms), 5, "float32")

    check(found, summed(terms, even(terms)), 5, TOLERANCES["float32"])


@routes
@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-9, 0.0])
def test_terms_that_cancel_are_exact_or_unresolved(route: Route, left: float) -> None:
    """As momentum does: the last two global adapters, nearly equal, are subtracted."""
    g = cast(some((40, 60), [8]), torch.float32)[0]
    terms = [g, Factors(g.B, g.A, g.scale), *cast(some((40, 60), [4], seed=50), torch.float32)]
    weights = torch.cat([torch.ones(8), -torch.ones(8), torch.full((4,), left)]).double()
    try:
        found = route(terms, weights, 4, "float32")
    except Unresolved:
        assert left < 1e-1 or route is by_dense
    else:
        check(found, summed(terms, weights), 4, TOLERANCES["float32"])


def test_gram_matrices_take_float64_if_terms_cancel() -> None:
    g = some((40, 60), [8])[0]
    terms = [g, Factors(g.B, g.A, g.scale), *some((40, 60), [4], seed=50)]
    weights = torch.cat([torch.ones(8), -torch.ones(8), torch.full((4,), 1e-2)]).double()

    found = by_gram(terms, weights, 4, "float32")

    assert found.U.dtype == torch.float64
    check(found, summed(terms, weights), 4, TOLERANCES["float32"])


@routes
def test_a_zero_update_has_no_directions(route: Route) -> None:
    terms = [
        Factors(torch.zeros(9, 3), torch.ones(3, 7)),
        Factors(torch.ones(9, 2), torch.ones(2, 7)),
    ]

    found = route(terms, torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64), 4, "float32")

    assert (found.U.shape, found.s.numel(), found.Vh.shape) == ((9, 0), 0, (0, 7))
    assert found.energy == found.residual == 0


@pytest.mark.parametrize("route", [by_dense, by_factored])
@pytest.mark.parametrize("small", [0, 600])
def test_directions_that_are_rounding_are_left_out(route, small, monkeypatch) -> None:
    monkeypatch.setattr(subspace, "SMALL", small)
    terms = [graded((60, 50), 3, 1), graded((60, 50), 3, 1)]

    found = route(terms, even(terms), 8, "float32")

    assert found.s.numel() == 3
    check(found, summed(terms, even(terms)), 8, TOLERANCES["float32"])


def test_gram_matrices_do_not_resolve_fewer_directions_than_pieces() -> None:
    same = [graded((60, 50), 3, 1), graded((60, 50), 3, 1)]
    with pytest.raises(Unresolved, match="rounding of the Gram matrices"):
        by_gram(same, even(same), 5, "float32")

    weights = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.float64)

    assert by_gram(same, weights, 5, "float32").s.numel() == 3


@pytest.mark.parametrize("route", [by_dense, by_factored])
def test_more_directions_than_the_smaller_side(route: Route) -> None:
    terms = some((9, 30), [4, 4])

    found = route(terms, even(terms), 50, "float32")

    check(found, summed(terms, even(terms)), 50, TOLERANCES["float32"])


def test_a_total_rank_beyond_the_smaller_side() -> None:
    terms = some((20, 30), [12, 12, 12])

    found = by_dense(terms, even(terms), 6, "float32")

    check(found, summed(terms, even(terms)), 6, TOLERANCES["float32"])


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("route", [by_dense, by_factored])
def test_a_flat_spectrum_is_unresolved(route: Route) -> None:
    Q, P = (torch.linalg.qr(random(seed, 200, 150))[0] for seed in (1, 2))
    terms = [Factors(Q * torch.linspace(1, 1.001, 150), P.T)]

    with pytest.raises(Unresolved, match=r"an error of .* products"):
        route(terms, torch.ones(150, dtype=torch.float64), 4, "float32")


@pytest.mark.usefixtures("iterating")
def test_the_iteration_stops_at_its_limit() -> None:
    update = summed([graded((80, 80), 60, 1)], torch.ones(60, dtype=torch.float64))
    matrix = torch.from_numpy(update)
    applied = 0

    def counted(V: Tensor) -> Tensor:
        nonlocal applied
        applied += 1
        return matrix @ V

    energy = float(matrix.square().sum())
    operator = subspace.Operator((80, 80), counted, lambda U: matrix.T @ U, energy, matrix)
    with pytest.raises(Unresolved):
        subspace.leading(operator, 4, 1e-13, limit=5)
    assert applied == 2
    check(subspace.leading(operator, 4, 1e-12), update, 4, 1e-12)


@routes
def test_values_out_of_range_are_unresolved(route: Route) -> None:
    for size in (1e-30, 1e30):
        one = some((20, 30), [3])[0]
        terms = [Factors(one.B * size, one.A * size)]
        try:
            found = route(cast(terms, torch.float32), even(terms), 2, "bfloat16")
        except Unresolved:
            continue
        check(found, summed(cast(terms, torch.float32), even(terms)), 2, TOLERANCES["bfloat16"])


@routes
def test_the_same_bytes_every_time(route: Route) -> None:
    terms = some((40, 60), [3, 9])

    one, other = (route(terms, even(terms), 5, "float32") for _ in range(2))

    assert torch.equal(one.U, other.U)
    assert torch.equal(one.Vh, other.Vh)


sizes = st.integers(1, 30)


@settings(max_examples=30)
@given(sizes, sizes, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9))
def test_gram_matrices_give_all_singular_values(rows, columns, ranks, rank) -> None:
    terms = some((rows, columns), ranks)
    weights = even(terms)
    grams = gram.prepare(terms, "float32")
    update = summed(terms, weights)
    s = np.linalg.svd(update)[1]

    ones = [torch.ones(term.rank, dtype=torch.float64) for term in terms]
    singles = [np.linalg.svd(summed([term], one))[1] for term, one in zip(terms, ones, strict=True)]
    for k, single in enumerate(singles):
        found = gram.spectrum(grams, k).numpy()
        np.testing.assert_allclose(found, single[: found.size], atol=1e-6 * single[0])
        np.testing.assert_array_less(single[found.size :], 1e-5 * single[0])
    energy = factored.energy(factored.prepare(terms, "float64"), weights)
    assert math.isclose(energy, np.linalg.norm(update) ** 2, rel_tol=1e-12)
    values = gram.singular_values(grams, weights, rank).numpy()
    np.testing.assert_allclose(values, s[: values.size], atol=1e-6 * s[0])
    assert values.size == min(rank, sum(ranks), rows, columns) or s[values.size] < 1e-5 * s[0]


@pytest.mark.parametrize("whole", [1000, 40], ids=["refined", "iterated"])
@pytest.mark.parametrize("decades", [0.05, 2, 12])
def test_leading_eigenvectors(whole, decades, monkeypatch) -> None:
    monkeypatch.setattr(eigen, "WHOLE", whole)
    monkeypatch.setattr(subspace, "SMALL", 0)
    one = graded((100, 100), 100, decades)
    Q = torch.linalg.qr(one.B)[0]
    exact = torch.logspace(0, -decades, 100, dtype=torch.float64)
    K = (Q * exact) @ Q.T

    values, vectors = eigen.top(K, 4, 1e-8)

    torch.testing.assert_close(values, exact[:4], atol=1e-12, rtol=0)
    left = K @ vectors - vectors * values
    assert left.abs().max() < 1e-8
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4).double(), atol=1e-12, rtol=0)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concatenation, "CHUNK", 7)
    monkeypatch.setattr(concatenation, "WIDTH", 3)
    monkeypatch.setattr(factored, "CHUNK", 4)
    X, Y = random(1, 30, 11).float(), random(2, 30, 5).float()
    exact = X.double().T @ X.double()

    for precision, near in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        torch.testing.assert_close(
            concatenation.gram(X, precision), exact, atol=30 * near, rtol=near
        )
    product = concatenation.long_product(X, Y)
    torch.testing.assert_close(product, X.double().T @ Y.double(), atol=1e-5, rtol=1e-5)
    terms = some((20, 30), [3, 8, 2])
    energy = factored.energy(factored.prepare(terms, "float64"), even(terms))
    assert math.isclose(energy, np.linalg.norm(summed(terms, even(terms))) ** 2, rel_tol=1e-12)


@pytest.mark.parametrize("lengths", [[1.0, 1.0, 1.0], [1.0, 1e-30, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("apart", [1.0, 1e-6])
def test_an_orthonormal_basis_of_any_columns(lengths: list[float], apart: float) -> None:
    X = (random(1, 20, 1) + apart * random(2, 20, 3)).float() * torch.tensor(lengths)

    Q, T = orthonormal(X)

    torch.testing.assert_close(Q.T @ Q, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(Q.double() @ T, X.double(), atol=5e-6, rtol=0)


def weighted(terms: Sequence[Factors], ratios: Sequence[float]) -> list[dense.Term]:
    """Terms whose rank index i has w' = 1 / 7 k and w = w' · ratio i, as in raFLoRA."""
    found = []
    for k, term in enumerate(terms, start=1):
        reference = torch.full((term.rank,), 1 / (7 * k), dtype=torch.float64)
        found.append(dense.Term(term, reference * torch.tensor(ratios[: term.rank]), reference))
    return found


@pytest.mark.parametrize("worth", [1, 1000], ids=["by ratio", "twice"])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_second_sum_under_other_weights(worth, chunk, monkeypatch) -> None:
    monkeypatch.setattr(dense, "WORTH", worth)
    monkeypatch.setattr(dense, "CHUNK", chunk)
    monkeypatch.setattr(dense, "ROWS", 8)
    terms = some((20, 30), [2, 4, 4, 6, 6])
    pieces = weighted(terms, [1.0, 1.0, 1 / 3, 1 / 3, 0.0, 2.0])
    pieces.append(dense.Term(some((20, 30), [3], seed=77)[0], torch.ones(3, dtype=torch.float64)))

    whole, second = dense.accumulate(iter(pieces), (20, 30), torch.float64, reference=True)

    factors = [one.factors for one in pieces]
    expected = summed(factors, torch.cat([one.weights for one in pieces]))
    np.testing.assert_allclose(whole.matrix, expected, atol=1e-12 * np.abs(expected).max())
    references = [one.reference for one in pieces[:-1]]
    expected = summed(factors[:-1], torch.cat([one for one in references if one is not None]))
    assert second is not None
    np.testing.assert_allclose(second.matrix, expected, atol=1e-12 * np.abs(expected).max())
    apart = [
        one.weights[i] * t.scale * torch.outer(t.B[:, i], t.A[i])
        for one, t in zip(pieces, factors, strict=True)
        for i in range(t.rank)
    ]
    energy = sum(float(piece.square().sum()) for piece in apart)
    assert math.isclose(whole.pieces, energy, rel_tol=1e-9)


def test_the_second_sum_costs_no_second_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under raFLoRA, both sums use each product of columns."""
    monkeypatch.setattr(dense, "WORTH", 4)
    operations = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal operations
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                B, A = args[-2:]
                operations += 2 * B.shape[0] * B.shape[1] * A.shape[1]
            return function(*args, **(kwargs or {}))

    terms = weighted(some((20, 30), [4, 8, 8]), [1.0] * 4 + [1 / 3] * 4)
    with Count():
        dense.accumulate(terms, (20, 30), torch.float32, reference=True)

    assert operations == 2 * 20 * 30 * 20


def test_only_a_chunk_of_terms_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CHUNK", 10)
    alive = most = 0

    class Watched(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream():
        nonlocal alive, most
        for k in range(12):
            one = some((20, 30), [4], seed=k)[0]
            alive += 1
            most = max(most, alive)
            B = one.B.as_subclass(Watched)
            yield dense.Term(Factors(B, one.A), torch.ones(4, dtype=torch.float64))

    dense.accumulate(stream(), (20, 30), torch.float32)

    assert 0 < most <= 5


def test_factored_forms_no_large_matrix() -> None:
    """At 700 × 900 and a total rank of 640: nothing out × in, and nothing S × S."""
    shapes: set[tuple[int, ...]] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            shapes.update(tuple(x.shape) for x in outputs if isinstance(x, Tensor))
            return result

    one = graded((700, 900), 320, 3)
    stacked = factored.prepare([one, one], "bfloat16")
    with Watch():
        factored.leading(stacked, torch.ones(640, dtype=torch.float64), 4, "bfloat16")

    assert {(700, 20), (640, 20)} <= shapes
    assert not {(640, 640), (700, 900), (900, 700)} & shapes


@routes
@dtypes
@pytest.mark.usefixtures("iterating")
def test_the_truncation_of_a_flat_spectrum_is_exact_or_unresolved(route: Route, dtype: str) -> None:
    """The result is the truncation that `--verify` computes, not only one of equal energy."""
    Q, P = (torch.linalg.qr(random(seed, 120, 90))[0] for seed in (1, 2))
    spectrum = torch.linspace(1, 0.8, 90, dtype=torch.float64)
    terms = [
        Factors((Q * spectrum)[:, part].float(), P[:, part].T.float())
        for part in torch.arange(90).chunk(3)
    ]
    update = summed(terms, even(terms))
    U, s, Vh = np.linalg.svd(update)
    best = (U[:, :8] * s[:8]) @ Vh[:8]

    try:
        found = route(terms, even(terms), 8, dtype)
    except Unresolved:
        return
    ours = (found.U.double() * found.s) @ found.Vh.double()
    distance = np.linalg.norm(ours.numpy() - best) / np.linalg.norm(update)
    assert distance < 2 * max(TOLERANCES[dtype], 2e-7)


@routes
@dtypes
def test_clients_in_the_same_space_are_exact_or_unresolved(route: Route, dtype: str) -> None:
    """Of a lower rank than wanted; LAPACK in float32 fails on some of them."""
    B, A = random(1, 200, 6), random(2, 6, 180)
    terms = [
        Factors((B @ random(k, 6, 6)).float(), (random(k + 50, 6, 6) @ A).float())
        for k in range(20)
    ]
    try:
        found = route(terms, even(terms), 12, dtype)
    except Unresolved:
        return
    check(found, summed(terms, even(terms)), 12, TOLERANCES[dtype])


@routes
@pytest.mark.parametrize("left", [1e-2, 1e-5, 1e-8])
def test_terms_that_cancel_do_not_become_zero(route: Route, left: float) -> None:
    """The update is the small remainder."""
    terms = []
    for k in range(4):
        B, A = random(k, 96, 8).float(), random(k + 9, 8, 80).float()
        terms += [Factors(B, A), Factors(-B + left * random(k + 20, 96, 8).float(), A)]
    update = summed(terms, even(terms))
    try:
        found = route(terms, even(terms), 4, "float32")
    except Unresolved:
        return
    assert found.s.numel() == 4
    assert abs(found.s[0] - np.linalg.norm(update, 2)) < 1e-5 * np.linalg.norm(update)


def test_a_refined_subspace_is_within_its_error_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Q = torch.linalg.qr(random(3, 300, 300))[0]
    flat = torch.linspace(1, 0.9, 300, dtype=torch.float64)
    K = (Q * flat) @ Q.T
    found = eigen._refined(K, 8, 1e-9)
    if found is not None:
        _, P = found
        outside = Q[:, 8:].T @ P
        assert float((outside.square().sum() * flat[0] / K.trace()).sqrt()) < 1e-8
    monkeypatch.setattr(eigen, "STEPS", 0)
    assert eigen._refined(K, 8, 1e-9) is None


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("route", ["dense", "factored"])
def test_singular_values_need_no_gap_between_directions(route: str) -> None:
    """The wanted singular value equals the next."""
    spectrum = torch.cat([torch.linspace(1, 0.5, 7), torch.full((2,), 0.5), torch.full((40,), 0.1)])
    Q, P = (torch.linalg.qr(random(seed, 90, 49))[0] for seed in (1, 2))
    terms = [Factors((Q * spectrum).float(), P.T.float())]
    ones = torch.ones(49, dtype=torch.float64)
    stacked = factored.prepare(terms, "bfloat16")
    whole, _ = dense.accumulate([dense.Term(terms[0], ones)], (90, 90), torch.float64)

    if route == "dense":
        found = dense.leading(whole, 8, "bfloat16", near=math.inf).s
    else:
        found = factored.leading(stacked, ones, 8, "bfloat16", near=math.inf).s

    torch.testing.assert_close(found, spectrum[:8].double(), atol=1e-5, rtol=0)
