"""Standard streams that may be closed, full, or without a reader. The command does its work all the
same, and ends with the exit code that its work has.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


class Lasting(io.FileIO):
    """A stream that gives up what can no longer be written; `failure` is why."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        if self.failure is None:
            try:
                return super().write(content)
            except OSError as error:
                self.failure = error
        return memoryview(content).nbytes


def secure_streams() -> None:
    """Put streams that last in the place of the standard ones."""
    for descriptor in range(3):
        if not _is_open(descriptor):
            # The lowest number that is free is this one: an adapter must not be opened under it, as
            # libraries write to it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (a descriptor, for ever)
    sys.stdout = _lasting(1, sys.stdout, sys.__stdout__)
    sys.stderr = _lasting(2, sys.stderr, sys.__stderr__)


def failure_of(stream: TextIO) -> OSError | None:
    """Why a stream could not be written, but for a reader that went away: it had enough."""
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, Lasting) else None
    return None if failure is None or failure.errno == errno.EPIPE else failure


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _lasting(descriptor: int, now: TextIO | None, at_start: TextIO | None) -> TextIO:
    """A stream that lasts. One that has been put in the place of Python's own stays."""
    if now is not None and now is not at_start:
        return now
    raw = Lasting(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if now is None else now.encoding,
        # A terminal that cannot show a character shows its escape.
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
