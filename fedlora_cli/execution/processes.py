"""Processes of this machine, which end with this one."""

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
    """So many processes of this machine, while the block runs. Raises ClusterError."""
    # A forked copy of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_begin)
    try:
        yield Workers(
            submit=lambda function, item: pool.submit(run_here, packed((function, item))),
            result=lambda future: taken(future.result()),
            window=lambda: 2 * number,
        )
    except BrokenProcessPool:
        found = "a process was ended: for memory, or it could not begin, as under a script without "
        found += "`if __name__ == '__main__'`"
        raise ClusterError(f"processes:{number}", found, "give fewer, or none") from None
    except BaseException:
        # Nobody waits for calls whose results nobody wants. Python 3.14 has a public way.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """What every process does first: an interruption is its parent's to handle, whose end it
    shares.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
