"""Signals that end the command: at once, as an exception, or after a step that must be whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import NoReturn

#: The exit code of a program that was interrupted at the keyboard: 128 + SIGINT.
INTERRUPTED = 130

#: The signals that end a command, as far as the system has them.
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Say so in one line and end the process, whatever it is at."""
    with suppress(OSError):
        os.write(2, b"error: interrupted; nothing is half written\n")
    os._exit(INTERRUPTED)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """In this block, an interrupt ends the process: for the time in which nothing is at work but
    the loading of libraries, which make other errors of an exception, or nothing at all.
    """
    with _in_place_of(signal.default_int_handler, leave):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """In this block, an interrupt is an exception again: what was begun is put in order."""
    with _in_place_of(leave, signal.default_int_handler):
        yield


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer the signals of `ENDING` to the end of this block.

    For a block that makes something and notes that it must be removed: an exception between the two
    would leave it behind. Only handlers written in Python, and only in the main thread, raise
    exceptions; others are not touched.
    """
    pending: list[int] = []
    with ExitStack() as restored:
        for number in ENDING if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if callable(handler):
                restored.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _: pending.append(number))
        yield
    for number in pending:
        signal.raise_signal(number)


@contextmanager
def _in_place_of(now: object, then: signal._HANDLER) -> Iterator[None]:
    """One handler of interrupts in place of another one. Any other stays: that of a program that
    uses this as a library, or none, where a shell lets a job in the background ignore them.
    """
    replaced = signal.getsignal(signal.SIGINT) is now
    # Where this is no main thread, no handler can be set, and none would be called.
    with suppress(ValueError):
        if replaced:
            signal.signal(signal.SIGINT, then)
    try:
        yield
    finally:
        with suppress(ValueError):
            if replaced:
                signal.signal(signal.SIGINT, now)  # type: ignore[arg-type]
