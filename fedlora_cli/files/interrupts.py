"""Signals that end the command: at once, as an exception, or after a step that must complete."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

#: Exit code after Ctrl-C: 128 + SIGINT.
INTERRUPTED = 130

#: Seconds until a lost interrupt is sent again, when the destructor has ended.
_AGAIN = 0.01

#: The signals that end a command, as far as the system has them.
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler: print a line and end the process at once."""
    with suppress(OSError):
        os.write(2, b"error: interrupted; nothing is half written\n")
    os._exit(INTERRUPTED)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """In this block, Ctrl-C ends the process at once.

    For the import of libraries, which turn an exception into other errors or ignore it.
    """
    with _in_place_of(signal.default_int_handler, leave):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """In this block, Ctrl-C raises KeyboardInterrupt again, so that unfinished work is removed."""
    hook = sys.unraisablehook
    with _in_place_of(leave, signal.default_int_handler):
        sys.unraisablehook = partial(_sent_again, hook)
        try:
            yield
        finally:
            sys.unraisablehook = hook


def _sent_again(hook: Callable[[Any], object], unraisable: Any) -> None:
    """Send an interrupt again that Python lost because it came in the middle of a destructor."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        hook(unraisable)


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
    """Replace the handler `now` of SIGINT by `then` for the block.

    Any other handler stays: that of a program which uses this library, or SIG_IGN, which shells set
    for background jobs.
    """
    replaced = signal.getsignal(signal.SIGINT) is now
    # Outside the main thread, handlers can neither be set nor called.
    with suppress(ValueError):
        if replaced:
            signal.signal(signal.SIGINT, then)
    try:
        yield
    finally:
        with suppress(ValueError):
            if replaced:
                signal.signal(signal.SIGINT, now)  # type: ignore[arg-type]
