"""Any number of threads gives the same results, in order, and stops at the first failure."""

from __future__ import annotations

import threading

import pytest
import torch

from fedlora_cli.execution import engine


@pytest.mark.parametrize("jobs", [0, 1, 2, 7])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    told = []

    results = list(engine.run(lambda n: n * n, range(20), jobs, lambda *step: told.append(step)))

    assert results == [n * n for n in range(20)]
    assert told == [(n, 20) for n in range(1, 21)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_call_has_one_core_and_the_setting_is_put_back(jobs: int) -> None:
    before = torch.get_num_threads()

    seen = list(engine.run(lambda _: torch.get_num_threads(), range(6), jobs))

    assert seen == [1] * 6
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("jobs", [2, 3])
def test_the_first_call_of_a_thread_gives_the_same_bytes_as_any_other(jobs: int) -> None:
    """LAPACK splits a QR of this size over the cores that it believes to have."""
    matrix = torch.randn(333, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def factor(_: int) -> bytes:
        return torch.linalg.qr(matrix)[0].numpy().tobytes()

    alone = set(engine.run(factor, range(3), 1))
    assert set(engine.run(factor, range(3 * jobs), jobs)) == alone
    assert len(alone) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_is_raised_and_the_rest_is_not_started(jobs: int) -> None:
    started = []

    def work(n: int) -> int:
        started.append(n)
        if n == 3:
            raise ValueError("three")
        return n

    with pytest.raises(ValueError, match="three"):
        list(engine.run(work, range(1000), jobs))
    assert len(started) <= 3 + 2 * jobs + 1


def test_no_more_than_two_results_per_thread_wait() -> None:
    lock, waiting, most = threading.Lock(), 0, 0

    def work(n: int) -> int:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return n

    for _ in engine.run(work, range(50), 2):
        with lock:
            waiting -= 1
    assert most <= 2 * 2 + 1
