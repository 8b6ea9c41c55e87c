"""Runs one function over many items: in turn, or on threads. The results do not depend on which."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

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
    items: Sequence[Item],
    jobs: int,
    progress: Progress = lambda done, total: None,
) -> Iterator[Result]:
    """`function` of every item, in the order of the items, on up to `jobs` threads.

    Every call uses one core: the parallelism is across items, and sums are never split
    differently, so that any number of jobs gives the same bytes. At most two results per thread
    wait to be taken, which bounds the memory.
    """
    import torch

    with _one_core_per_call():
        if jobs == 1:
            for done, item in enumerate(items, start=1):
                yield function(item)
                progress(done, len(items))
            return
        # A new thread takes all cores for its first call unless it is told itself.
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[Result]] = deque()
            try:
                for done in range(1, len(items) + 1):
                    started = done - 1 + len(waiting)
                    for item in items[started : done - 1 + 2 * jobs]:
                        waiting.append(pool.submit(function, item))
                    yield waiting.popleft().result()
                    progress(done, len(items))
            finally:
                for future in waiting:
                    future.cancel()


@contextmanager
def _one_core_per_call() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
