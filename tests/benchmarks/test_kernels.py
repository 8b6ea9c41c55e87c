"""What the kernels promise: their accuracy, and their times, told as ratios within one run.

Times are those of the thread on one core, not of the clock: others may use the machine too. They
fail no test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.calibrate import cohort, routes, seconds
from benchmarks.rows import Row
from fedlora_cli.execution import engine
from fedlora_cli.kernels import cost
from fedlora_cli.kernels.leading import TOLERANCES
from fedlora_cli.linalg import lowrank

SHAPE, TOTAL, RANK = (4096, 4096), 600, 64


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # glibc keeps freed memory for the next module only once it has seen a block as large as this
    # freed: what any earlier module of a real run does.
    torch.empty(engine.KEPT, dtype=torch.uint8)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense_svd() -> float:
    """Seconds of one dense SVD of such a module, float32, one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = seconds(lambda: torch.linalg.svd(torch.randn(SHAPE), full_matrices=False), 1)
    torch.set_num_threads(before)
    return taken


@pytest.mark.benchmark
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["shared", "independent"])
def test_leading_directions_in_three_times_the_two_gram_products(
    kind: str, dtype: str, dense_svd: float, tell: Callable[[Row], None]
) -> None:
    """Twenty clients of ranks 8 to 64, together 600, in one 4096 × 4096 module."""
    terms, weights = cohort(SHAPE, TOTAL, RANK, kind)
    route = cost.choose(SHAPE, TOTAL, RANK, dtype).route
    kernel = routes(terms, weights, RANK, dtype)[route]
    B, A = torch.randn(SHAPE[0], TOTAL), torch.randn(TOTAL, SHAPE[1])

    kernel()
    taken, floor = math.inf, math.inf
    for _ in range(7):  # in turn, so that both meet the same machine
        taken = min(taken, seconds(kernel, 1))
        floor = min(floor, seconds(lambda: (B.T @ B, A @ A.T), 1))

    found = kernel()
    exact, s = lowrank.svd(lowrank.orthogonalize(terms), weights, RANK)
    reference = exact.U * exact.s @ exact.Vh
    error = (found.U.double() * found.s @ found.Vh.double() - reference).norm() / reference.norm()
    said = found.residual / float(torch.linalg.vector_norm(s))
    work = f"{kind}, {dtype}, {route}, error {error:.1e}, residual {said:.1e}"
    tell(Row("kernel", work, "thread", taken, "dense SVD", dense_svd, at_least=50))
    # 3 where nobody else uses the machine's caches.
    tell(Row("kernel", work, "thread", taken, "two Gram products", floor, at_most=3.3))
    assert error <= (1e-6 if dtype == "float32" else TOLERANCES[dtype])


@pytest.mark.benchmark
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["shared", "independent"])
@pytest.mark.parametrize("total", [120, 600, 900])
def test_the_cost_model_chooses_well(
    total: int, kind: str, dtype: str, tell: Callable[[Row], None]
) -> None:
    """It should be within 1.5 times of the best route that holds, and a tenth for noise."""
    shape = (768, 768)
    work = routes(*cohort(shape, total, RANK, kind), RANK, dtype)
    choice = cost.choose(shape, total, RANK, dtype)
    possible = [one.route for one in choice.estimates if one.possible is None]
    taken = {route: seconds(work[route], 5) for route in possible}

    best = min(taken, key=taken.__getitem__)
    told = f"rank {total}, {kind}, {dtype}, {choice.route}"
    what, against = "chosen route", f"{best}, or what is quick"
    quick = max(taken[best], cost.QUICK / 1.6)
    tell(Row("cost model", told, what, taken[choice.route], against, quick, at_most=1.6))
    assert choice.route in possible
