"""A progress bar with the remaining time, on a terminal, for work longer than a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedlora_cli.execution import engine

#: Seconds of work before the bar appears.
PATIENCE = 1.0


@contextmanager
def progress_on(console: Console, *, shown: bool) -> Iterator[engine.Stage]:
    """A function that begins a stage of the work and returns the callback for its progress."""
    if not (shown and console.is_terminal):
        yield engine.quiet
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    timer = Timer(PATIENCE, bars.start)
    timer.daemon = True
    timer.start()

    def begin(name: str) -> engine.Progress:
        task = bars.add_task(name, total=None)
        return lambda done, total: bars.update(task, completed=done, total=total)

    try:
        yield begin
    finally:
        timer.cancel()
        timer.join()
        bars.stop()
