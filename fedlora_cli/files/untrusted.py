"""Files that somebody else wrote, and may still be writing: opened once, read by position."""

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

#: Rank 256 in all layers of a 405B model takes 40 GB in float32. A file beyond this is a hole.
MAX_FILE_BYTES = 64 * 1024**3

#: Bytes that are hashed at a time.
_BLOCK = 1024 * 1024

#: Bytes that are asked of a store at a time where all are wanted, and where the beginning of a file
#: is: the headers of most adapters are shorter.
_REMOTE_BLOCK = 8 * 1024 * 1024
_HEAD = 128 * 1024

#: What stores call the version of a file, or else when it was written.
_VERSIONS = (
    *("VersionId", "ETag", "etag", "generation", "blob_id"),
    *("LastModified", "mtime", "ino", "created"),
)

#: Nanoseconds in which a file may change twice without a file system's clock showing it.
_TICK = 20_000_000

#: A pipe must not make us wait for whoever writes to it. Windows knows no such pipes.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class State(NamedTuple):
    """A file at one moment: its size and, in nanoseconds, when its content and when anything about
    it was changed last. The last one is the clock's: nobody can set it back. The number that the
    file system gave it tells apart two files that were made at once. In object storage, its size
    and its version.
    """

    size: int
    modified: int = 0
    changed: int = 0
    version: str = ""
    number: int = 0


@dataclass(frozen=True)
class Untrusted:
    """An open regular file in the `state` in which it was opened."""

    path: Path
    file: io.FileIO
    state: State

    def fill(self, start: int, buffer: bytearray) -> None:
        """The bytes from `start` on, as many as the buffer holds. Raises InputError."""
        self.file.seek(start)
        view = memoryview(buffer)
        while view:  # one read returns at most 2 GiB
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
        """The whole file, in pieces. Raises InputError.

        From then on, whoever finds the file in the same state finds the same bytes: where it has
        just changed, another change might not show yet, and is waited for.
        """
        age = time.time_ns() - self.state.changed
        if 0 <= age < _TICK:
            time.sleep((_TICK - age) / 1e9)
        for start in range(0, self.state.size, _BLOCK):
            yield self.read(start, min(_BLOCK, self.state.size - start))


@dataclass(frozen=True)
class UntrustedRemote:
    """The same in object storage, where every read is a question to the store."""

    path: Remote
    state: State

    def fill(self, start: int, buffer: bytearray) -> None:
        """The bytes from `start` on, as many as the buffer holds. Raises InputError."""
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
        """The whole file, in pieces. Raises InputError."""
        for start in range(0, self.state.size, _REMOTE_BLOCK):
            yield self.read(start, min(_REMOTE_BLOCK, self.state.size - start))

    @cached_property
    def _head(self) -> bytes:
        """The beginning, of which the first bytes tell how many more are wanted."""
        return self.path.read(0, min(_HEAD, self.state.size))


@contextmanager
def opened(path: Location, state: State | None = None) -> Iterator[Untrusted | UntrustedRemote]:
    """The file while the block reads it; at its end, it must not have changed since it was opened,
    nor since it was in `state`.

    What is opened is what is looked at: no other file can take its place in between. There is no
    memory map, because whoever cuts a file short under one kills the reader without a message.
    Raises InputError for what is no regular file, or is too large, cannot be read, or changed.
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


def unreadable(path: Location, error: OSError) -> InputError:
    """What the system said, or a store, as an error about `path`."""
    if isinstance(error, StorageError):
        return InputError(path, f"cannot be read ({error})", error.cure)
    reason = (error.strerror or str(error)).lower()
    place = "address" if isinstance(path, Remote) else "path"
    return InputError(path, f"cannot be read ({reason})", f"check the {place} and its permissions")


def _state(status: os.stat_result) -> State:
    return State(status.st_size, status.st_mtime_ns, status.st_ctime_ns, number=status.st_ino)


def _state_of(path: Remote) -> State:
    """Raises InputError for what is no file or too large, and OSError."""
    told = path.info()
    if told["type"] != "file":
        raise InputError(path, "not a file", "replace it by the file itself")
    _check_size(path, int(told["size"]))
    versions = [str(told[name]) for name in _VERSIONS if told.get(name) is not None]
    return State(int(told["size"]), version=" ".join(versions))


def _check_size(path: Location, size: int) -> None:
    if size > MAX_FILE_BYTES:
        found = f"{size} bytes, more than {MAX_FILE_BYTES}"
        raise InputError(path, found, "check what this file is")


def _changed(path: Location) -> InputError:
    return InputError(path, "changed while being read", "wait until it is uploaded")
