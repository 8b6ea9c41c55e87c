"""Run a function on many items: serially, on threads, on processes or on a cluster.

The results are the same for all of them.
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
    """A collection of known length whose items may be made one by one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Each]: ...


#: Called after each result with the numbers of finished and of all items.
Progress = Callable[[int, int], None]

#: Called with the name of a stage of the work. Returns the progress callback of that stage.
Stage = Callable[[str], Progress]


def quiet(stage: str) -> Progress:
    """A stage without progress."""
    return lambda done, total: None


def available_cores() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    function: Callable[[Item], Result],
    items: Items[Item],
    executor: Workers | int,
    progress: Progress = lambda done, total: None,
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order. A number as `executor` means threads, and 0
    all cores.

    Each call uses one core, so sums are always split the same way and any number of workers gives
    the same bytes. At most two results per worker wait to be taken, which bounds the memory. For
    processes and clusters, the function must be defined in a module, and items should be small.
    """
    if isinstance(executor, int):
        with _one_core_per_call(), _threads(executor or available_cores()) as workers:
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
    """The workers for `run`, for the block: a cluster as `--cluster` names it, or `jobs` threads.

    Raises UsageError and ClusterError.
    """
    # The caller's own computations also use one core, so that their bytes do not depend on it.
    chosen = _threads(jobs) if cluster is None else connected(cluster)
    with _one_core_per_call(), chosen as workers:
        yield workers


#: Bytes, just below glibc's limit of 32 MiB. Once a block of this size is freed, glibc keeps freed
#: blocks up to that size for reuse. This saves a twentieth of the time of a module.
KEPT = 31 * 1024 * 1024


@contextmanager
def _threads(number: int) -> Iterator[Workers]:
    import torch

    torch.empty(KEPT, dtype=torch.uint8)
    if number == 1:
        yield Workers(submit=_done, result=Future.result, window=lambda: 1)
        return
    # Without the initializer, a new thread uses all cores for its first call.
    with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Workers(submit=pool.submit, result=Future.result, window=lambda: 2 * number)


def _done(function: Callable[[Any], Any], item: Any) -> Future[Any]:
    """Run a call at once. Returns its result as a finished future."""
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
