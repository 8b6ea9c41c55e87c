"""Locks: only one process at a time works in a folder, or at a path to be created."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlora_cli.errors import OutputError
from fedlora_cli.files.documents import unwritable
from fedlora_cli.files.interrupts import signals_deferred

_LOCK = ".lock"

#: Errors of file systems without locks, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder for the block. Raises OutputError if another process has the lock.

    The system releases the lock when the process ends, even if it is killed.
    """
    with (folder / _LOCK).open("w") as file:
        _take(file.fileno(), folder)
        yield


@contextmanager
def alone_at(target: Path) -> Iterator[bool]:
    """Lock a path for the block. Raises OutputError if another process has the lock.

    Yields False if the system has no locks. The lock is on the empty file `.NAME.lock` beside the
    target, which is removed at the end. A file that a killed process left is not locked.
    """
    if os.name == "nt":
        yield False
        return
    path = target.with_name(f".{target.name}{_LOCK}")
    lock = held = None
    try:
        with signals_deferred():
            lock, held = _taken(path, target)
        yield held
    finally:
        with signals_deferred():
            if lock is not None:
                # The file is removed before the lock is released: a process that then gets the
                # lock sees that the file has no name.
                with suppress(OSError):
                    path.unlink()
                os.close(lock)


def _taken(path: Path, target: Path) -> tuple[int, bool]:
    """The open lock file, and whether the system has locks. Raises OutputError."""
    while True:
        lock = _open(path, target)
        try:
            held = _take(lock, target)
        except BaseException:
            os.close(lock)
            raise
        if not held or _is(path, lock):
            return lock, held
        os.close(lock)  # its last owner removed the file: try again with a new file


def _open(path: Path, target: Path) -> int:
    """Open the lock file, or create it. Raises OutputError."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise unwritable(target, error) from None
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        os.close(lock)
        raise OutputError(path, "a file that is not a lock of fedlora", "move it away")
    return lock


def _take(lock: int, place: Path) -> bool:
    """Take the lock. False if the system has no locks. Raises OutputError if it is taken."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found = "another process is writing there"
        raise OutputError(place, found, "wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise unwritable(place, error) from None
        return False
    return True


def _is(path: Path, file: int) -> bool:
    """Whether the open file still has this path."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False
