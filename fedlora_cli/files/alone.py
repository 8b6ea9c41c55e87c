"""One process at a time: in a folder, or at a name that need not be there yet."""

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

#: What a file system says that has no locks, as some network file systems have none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process in this block with the same folder. Raises OutputError where there is one.

    The system lets go of the lock when the process ends, however it ends.
    """
    with (folder / _LOCK).open("w") as file:
        _take(file.fileno(), folder)
        yield


@contextmanager
def alone_at(target: Path) -> Iterator[bool]:
    """No other process in this block with the same target. Raises OutputError where there is one.

    False where the system has no locks: then nothing is known of others. The lock is the empty file
    `.NAME.lock` beside the target. It is removed at the end; one that a killed process left is held
    by nobody, and taken.
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
                # Removed before it is released: the next process that takes it sees that it has no
                # name any more.
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
        os.close(lock)  # the process that held it removed it: another file has the name, or none


def _open(path: Path, target: Path) -> int:
    """The lock file, made where there is none. Raises OutputError."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise unwritable(target, error) from None
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        os.close(lock)
        raise OutputError(path, "it is there and no lock of this program", "move it away")
    return lock


def _take(lock: int, place: Path) -> bool:
    """Take the lock, where the system has any. Raises OutputError where another process has it."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found = "another process is at work in it"
        raise OutputError(place, found, "wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise unwritable(place, error) from None
        return False
    return True


def _is(path: Path, file: int) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False
