"""Runs one function over many items: in turn, on threads, on processes or on a cluster. The results
do not depend on which.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

from fedlora_cli.execution.cluster import Workers, connected

Item = TypeVar("Item")
Result = TypeVar("Result")
Each = TypeVar("Each", covariant=True)


class Items(Protocol[Each]):
    """So many of them, each made when it is its turn."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Each]: ...


#: Told after every result: how many are done, of how many.
Progress = Callable[[int, int], None]

#: Told what is being done, before every stage of the work, and gives the progress of that stage.
Stage = Callable[[str], Progress]


def quiet(stage: str) -> Progress:
    """The stage of those who want to hear nothing."""
    return lambda done, total: None


def available_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    function: Callable[[Item], Result],
    items: Items[Item],
    executor: Workers | int,
    progress: Progress = lambda done, total: None,
) -> Iterator[Result]:
    """`function` of every item, in the order of the items. A number is one of threads.

    Every call uses one core: the parallelism is across items, and sums are never split
    differently, so that any number of workers gives the same bytes. At most two results per worker
    wait to be taken, which bounds the memory. On processes and clusters, the function must stand in
    a module, and an item have all that it needs, and little else.
    """
    if isinstance(executor, int):
        with _one_core_per_call(), _threads(executor) as workers:
            yield from run(function, items, workers, progress)
        return
    waiting: deque[Future[Any]] = deque()
    coming = iter(items)
    try:
        for done in range(1, len(items) + 1):
            for item in islice(coming, max(0, executor.window() - len(waiting))):
                waiting.append(executor.submit(function, item))
            yield executor.result(waiting.popleft())
            progress(done, len(items))
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def executor(cluster: str | None, jobs: int) -> Iterator[Workers]:
    """Who runs the calls of `run`: a cluster as `--cluster` names it, or else so many threads.

    It may be used again and again while the block runs. Raises UsageError and ClusterError.
    """
    # What the caller computes meanwhile is the same, whoever else computes.
    chosen = _threads(jobs) if cluster is None else connected(cluster)
    with _one_core_per_call(), chosen as workers:
        yield workers


#: glibc gives a large block of memory back to the system at once, and then keeps all that are
#: smaller: this one is for that, just below the limit of 32 MiB. Pages that every module would ask
#: for anew take a twentieth of its time.
KEPT = 31 * 1024 * 1024


@contextmanager
def _threads(number: int) -> Iterator[Workers]:
    import torch

    torch.empty(KEPT, dtype=torch.uint8)
    if number == 1:
        yield Workers(submit=_done, result=Future.result, window=lambda: 1)
        return
    # A new thread takes all cores for its first call unless it is told itself.
    with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Workers(submit=pool.submit, result=Future.result, window=lambda: 2 * number)


def _done(function: Callable[[Any], Any], item: Any) -> Future[Any]:
    """A call that is over when it has begun."""
    future: Future[Any] = Future()
    future.set_result(function(item))
    return future


@contextmanager
def _one_core_per_call() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
