"""Worker processes on this machine. They end with this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from fedlora_cli.errors import ClusterError
from fedlora_cli.execution.calls import packed, run_here, taken
from fedlora_cli.execution.workers import Workers


@contextmanager
def on_processes(number: int) -> Iterator[Workers]:
    """`number` processes, for the block. Raises ClusterError."""
    # A fork of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_begin)
    try:
        yield Workers(
            submit=lambda function, item: pool.submit(run_here, packed((function, item))),
            result=lambda future: taken(future.result()),
            window=lambda: 2 * number,
        )
    except BrokenProcessPool:
        found = "a process was killed (too little memory?), or could not start (a script without "
        found += "`if __name__ == '__main__'`?)"
        raise ClusterError(f"processes:{number}", found, "give fewer processes, or none") from None
    except BaseException:
        # Do not wait for calls that are no longer needed. Python 3.14 has a public method for this.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Initialize a process: ignore SIGINT, which the parent handles, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
