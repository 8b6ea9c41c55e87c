"""Files from clients, which may still be changing: opened once, read by position."""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location, Remote, StorageError

#: Rank 256 in all layers of a 405B model takes 40 GB in float32. A larger file is a sparse file.
MAX_FILE_BYTES = 64 * 1024**3

#: Bytes hashed at a time.
_BLOCK = 1024 * 1024

#: Bytes requested from a store at a time, for a whole file and for its beginning: most adapters
#: have a shorter header.
_REMOTE_BLOCK = 8 * 1024 * 1024
_HEAD = 128 * 1024

#: Names under which stores give the version of a file, or the time of its last change.
_VERSIONS = (
    *("VersionId", "ETag", "etag", "generation", "blob_id"),
    *("LastModified", "mtime", "ino", "created"),
)

#: Nanoseconds between two changes of a file that may have the same time stamp.
_TICK = 20_000_000

#: Opening a pipe must not block until a writer opens it. Windows has no such pipes.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class State(NamedTuple):
    """The state of a file at a moment, to detect changes.

    - `size` in bytes.
    - `modified`, `changed`: times of the last change of the content and of anything, in
      nanoseconds. Programs can set the first back, but not the second.
    - `version`: in object storage.
    - `number`: the inode, which differs between two files made at the same time.
    """

    size: int
    modified: int = 0
    changed: int = 0
    version: str = ""
    number: int = 0


@dataclass(frozen=True)
class Untrusted:
    """An open regular file, with its state when it was opened."""

    path: Path
    file: io.FileIO
    state: State

    def fill(self, start: int, buffer: bytearray) -> None:
        """Fill the buffer with the bytes from `start` on. Raises InputError."""
        self.file.seek(start)
        view = memoryview(buffer)
        while view:  # a read returns at most 2 GiB
            count = self.file.readinto(view)
            if not count:
                raise _changed(self.path)
            view = view[count:]

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on. Raises InputError."""
        buffer = bytearray(length)
        self.fill(start, buffer)
        return bytes(buffer)

    def blocks(self) -> Iterator[bytes]:
        """The whole file in blocks. Raises InputError.

        If the file has just changed, wait until a further change would get another time stamp.
        Then an equal state means equal bytes.
        """
        age = time.time_ns() - self.state.changed
        if 0 <= age < _TICK:
            time.sleep((_TICK - age) / 1e9)
        for start in range(0, self.state.size, _BLOCK):
            yield self.read(start, min(_BLOCK, self.state.size - start))


@dataclass(frozen=True)
class UntrustedRemote:
    """A file in object storage. Each read is a request to the store."""

    path: Remote
    state: State

    def fill(self, start: int, buffer: bytearray) -> None:
        """Fill the buffer with the bytes from `start` on. Raises InputError."""
        buffer[:] = self.read(start, len(buffer))

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on. Raises InputError."""
        end = start + length
        if end <= _HEAD and (start == 0 or "_head" in self.__dict__):
            content = self._head[start:end]
        else:
            content = self.path.read(start, length) if length else b""
        if len(content) != length:
            raise _changed(self.path)
        return content

    def blocks(self) -> Iterator[bytes]:
        """The whole file in blocks. Raises InputError."""
        for start in range(0, self.state.size, _REMOTE_BLOCK):
            yield self.read(start, min(_REMOTE_BLOCK, self.state.size - start))

    @cached_property
    def _head(self) -> bytes:
        """The beginning of the file, requested once: it usually holds the whole header."""
        return self.path.read(0, min(_HEAD, self.state.size))


@contextmanager
def opened(path: Location, state: State | None = None) -> Iterator[Untrusted | UntrustedRemote]:
    """Open a file for the block. At the end, it must not have changed since it was opened or, if
    given, since `state`.

    The checks are on the open file, so no other file can replace it in between. It is not mapped
    into memory, because truncating a mapped file kills its reader without a message. Raises
    InputError if the path is not a regular file, is too large, cannot be read, or has changed.
    """
    if isinstance(path, Remote):
        try:
            before = state or _state_of(path)
            yield UntrustedRemote(path, before)
            if _state_of(path) != before:
                raise _changed(path)
        except OSError as error:
            raise unreadable(path, error) from None
        return
    try:
        descriptor = os.open(path, _FLAGS)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(path, "not a regular file", "replace it by the file itself")
            _check_size(path, status.st_size)
            with io.FileIO(descriptor, closefd=False) as file:
                yield Untrusted(path, file, _state(status))
            if _state(os.fstat(descriptor)) != (state or _state(status)):
                raise _changed(path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from None


def size_of(path: Location) -> int:
    """The size of a file in bytes. Raises InputError."""
    with opened(path) as file:
        return file.state.size


def unreadable(path: Location, error: OSError) -> InputError:
    """The InputError for an OSError or a StorageError at `path`."""
    if isinstance(error, StorageError):
        return InputError(path, f"cannot be read ({error})", error.cure)
    reason = (error.strerror or str(error)).lower()
    place = "address" if isinstance(path, Remote) else "path"
    return InputError(path, f"cannot be read ({reason})", f"check the {place} and its permissions")


def _state(status: os.stat_result) -> State:
    return State(status.st_size, status.st_mtime_ns, status.st_ctime_ns, number=status.st_ino)


def _state_of(path: Remote) -> State:
    """The state of a remote file. Raises InputError if it is a folder or too large, and OSError."""
    entry = path.info()
    if entry["type"] != "file":
        raise InputError(path, "not a file", "replace it by the file itself")
    _check_size(path, int(entry["size"]))
    versions = [str(entry[name]) for name in _VERSIONS if entry.get(name) is not None]
    return State(int(entry["size"]), version=" ".join(versions))


def _check_size(path: Location, size: int) -> None:
    if size > MAX_FILE_BYTES:
        found = f"{size} bytes, more than {MAX_FILE_BYTES}"
        raise InputError(path, found, "check what this file is")


def _changed(path: Location) -> InputError:
    return InputError(path, "changed while being read", "wait until it is uploaded")
