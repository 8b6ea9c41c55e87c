"""Mounts, flushing to the disk, and temporary folders that do not stay."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora_cli.files.interrupts import signals_deferred

#: Errors of file systems that cannot flush, such as some network file systems. They are ignored.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

#: Linux's list of mounts, the column of the mount point, and its escapes for blanks.
_MOUNTS = Path("/proc/self/mountinfo")
_PLACE = 4
_OCTAL = re.compile(rb"\\([0-7]{3})")


def is_mounted(path: Path) -> bool:
    """Whether a file or folder is a mount point, which cannot be replaced.

    Bind mounts, which containers use, are found on Linux only.
    """
    if not path.exists():
        return False
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines() if sys.platform == "linux" else []
    except OSError:
        return False
    places = (line.split(b" ")[_PLACE] for line in lines)
    wanted = os.fsencode(path.resolve())
    return any(_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), at) == wanted for at in places)


def flush(descriptor: int) -> None:
    """Flush an open file or folder to the disk, if the file system can. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Windows cannot flush folders. Raises OSError."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent`, or in the system's temporary folder, removed when the block ends.

    Signals wait until the folder is sure to be removed, and while it is removed. Raises OSError.
    """
    folder: Path | None = None
    try:
        with signals_deferred():
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        yield folder
    finally:
        with signals_deferred():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
