"""Runs on several processes. Each process loads the model once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch

from fedlora_cli.errors import InputError
from fedlora_cli.execution.calls import packed, unpacked
from fedlora_cli.libraries import muted
from fedlora_cli.methods import register, registered
from fedlora_cli.simulation.course import Federation, perform
from fedlora_cli.simulation.loading import loaded
from fedlora_cli.simulation.options import SimulateOptions
from fedlora_cli.simulation.places import Run
from fedlora_cli.simulation.split import parts_of
from fedlora_cli.text import first_line

#: Seconds between updates of the progress.
_PAUSE = 0.3


def perform_all(
    root: Path, options: SimulateOptions, runs: Sequence[Run], jobs: int, look: Callable[[], None]
) -> None:
    """Do the remaining rounds of all runs, and call `look` repeatedly. Raises FedloraError."""
    if jobs == 1:
        for run in runs:
            _perform(root, options, run, look)
        return
    # A fork of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    methods = packed(registered({run.arm.method for run in runs}))
    # The workers ignore SIGINT, which this process handles.
    ignored = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(jobs, context, initializer=signal.signal, initargs=ignored)
    try:
        waiting = {pool.submit(_perform_with, methods, root, options, run) for run in runs}
        while waiting:
            done, waiting = wait(waiting, _PAUSE, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            look()
        pool.shutdown()
    except BrokenProcessPool:
        found = "a training process was killed (too little memory?), or could not start (a script "
        found += "without `if __name__ == '__main__'`?)"
        raise InputError(root, found, "run the same command with --jobs 1") from None
    finally:
        # After an interruption, unfinished rounds are stopped and later repeated.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def _check_parent() -> None:
    """End this process if its parent was killed. Called between rounds."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # after an exception, the next run would start


def _perform_with(methods: bytes, root: Path, options: SimulateOptions, run: Run) -> None:
    """`_perform` in a process that has not registered these methods yet."""
    for method in unpacked(methods):
        register(method)
    _perform(root, options, run)


def _perform(
    root: Path, options: SimulateOptions, run: Run, on_round: Callable[[], None] = _check_parent
) -> None:
    _check_parent()
    setting = options.setting
    try:
        with muted(), threads(options.threads):
            task, base = loaded(setting.source, root, options.device)
            names, parts = parts_of(task.train, setting, run.seed)
            perform(Federation(root, options, task, base, names, parts), run, on_round)
    except torch.OutOfMemoryError as error:
        found = f"the device has too little memory ({first_line(error)})"
        cure = "give a smaller --batch-size or fewer --jobs; the same command then resumes"
        raise InputError(root, found, cure) from None


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use `number` cores. Another number would split, and so round, sums differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
