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

#: What a file system says that keeps no order on a disk, as some network ones and those of
#: containers do: nothing can be flushed there, and nothing is wrong.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

#: Where Linux tells what is mounted, the place of a mount in its line, and how it writes a blank.
_MOUNTS = Path("/proc/self/mountinfo")
_PLACE = 4
_OCTAL = re.compile(rb"\\([0-7]{3})")


def is_mounted(path: Path) -> bool:
    """Whether a file or folder is where something is mounted: no other can take its place.

    A part of the same disk that is mounted once more, as containers have it, only Linux tells.
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
    return any(_OCTAL.sub(lambda one: bytes([int(one[1], 8)]), place) == wanted for place in places)


def flush(descriptor: int) -> None:
    """Have an open file or folder on the disk, where the file system can. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync(path: Path) -> None:
    """Have a file or, where the system allows it, a folder on the disk. Raises OSError."""
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

    A signal neither comes between its making and the promise to remove it, nor cuts the removal
    short. Raises OSError.
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
