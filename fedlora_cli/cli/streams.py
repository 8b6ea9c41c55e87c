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
    """A stream that drops all output after a failed write; `failure` is the error."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        if self.failure is None:
            try:
                return super().write(content)
            except OSError as error:
                self.failure = error
        return memoryview(content).nbytes


def secure_streams() -> None:
    """Replace the standard streams by streams that survive a failed write."""
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
    """The error of a failed write; None without any, or if the reader closed the stream."""
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
    """A stream that survives a failed write; a replacement of Python's own stream stays."""
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
