"""Files and folders in object storage, with the part of pathlib's interface that readers use.

fsspec (https://filesystem-spec.readthedocs.io), a dependency of torch, reaches the stores. Its
libraries find credentials in the environment or in their own files.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from pickle import PicklingError
from typing import IO, Any, Protocol, TypeVar

from fedlora_cli.text import first_line

Result = TypeVar("Result")

#: For each URL scheme, the package to install; None if none is needed.
EXTRAS = {"s3": "fedlora[s3]", "gs": "fedlora[gcs]", "hf": None, "memory": None}

#: Requests to a store at the same time.
_AT_ONCE = 16

#: Characters with a special meaning in the address of an object.
_SPECIAL = frozenset("?#")

#: For a store whose library reads ahead: the options that switch this off.
_PLAIN = {"hf": {"cache_type": "none"}}

_NOTHING = "nothing is there, or no such bucket"


class StorageError(OSError):
    """A store's error for the URL `where`: the reason on one line, and what to do."""

    def __init__(self, where: str, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.where, self.cure = where, cure

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, str]]:
        return type(self), (self.where, str(self), self.cure)


class MemoryStore(Protocol):
    """A store in the memory of this process, also with fsspec's `ls`, `info` and `cat_file`."""

    def create(self, key: str) -> AbstractContextManager[IO[bytes]]: ...
    def label(self, key: str) -> str: ...


class Remote:
    """A file or folder of a store: `key` is its address after the `protocol`, bucket first.

    `memory` is the store of files in memory; None for a store that fsspec reaches.

    A folder is listed once, on first use, and so is each folder reached from it by `/`: a command
    sees a single state of the store. All methods that send requests raise OSError.

    >>> ann = Remote("s3", "bucket/round-01") / "ann"
    >>> str(ann), ann.name, ann.parent.name
    ('s3://bucket/round-01/ann', 'ann', 'round-01')
    """

    def __init__(
        self,
        protocol: str,
        key: str,
        above: Remote | None = None,
        memory: MemoryStore | None = None,
    ) -> None:
        self.protocol, self._path, self._above = protocol, PurePosixPath(key), above
        self.memory = memory
        self._below: dict[str, Remote] = {}

    def __str__(self) -> str:
        address = f"{self.protocol}://{self.key}"
        return address if self.memory is None else self.memory.label(self.key)

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str, int]:
        return self.protocol, self.key, id(self.memory)

    def __reduce__(self) -> tuple[type[Remote], tuple[str, str]]:
        """Pickle the address only: another process lists the store again."""
        if self.memory is not None:
            raise PicklingError(f"{self} is in the memory of this process")
        return type(self), (self.protocol, self.key)

    def __truediv__(self, name: str) -> Remote:
        if name not in self._below:
            self._below[name] = Remote(self.protocol, str(self._path / name), self, self.memory)
        return self._below[name]

    @property
    def unlisted(self) -> Remote:
        """The same place, whose listing is requested anew."""
        return Remote(self.protocol, self.key, memory=self.memory)

    @property
    def key(self) -> str:
        return str(self._path)

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return (f"{self.protocol}://", *self._path.parts)

    @property
    def parent(self) -> Remote:
        return self._above or Remote(self.protocol, str(self._path.parent), memory=self.memory)

    @property
    def parents(self) -> tuple[Remote, ...]:
        above = self._path.parents[:-1]  # without the store itself
        return tuple(Remote(self.protocol, str(parent), memory=self.memory) for parent in above)

    def resolve(self) -> Remote:
        """The path itself: a store has no links."""
        return self

    def absolute(self) -> Remote:
        return self

    def is_symlink(self) -> bool:
        return False

    def exists(self) -> bool:
        return self._kind is not None

    def is_file(self) -> bool:
        return self._kind == "file"

    def is_dir(self) -> bool:
        return self._kind == "directory"

    def iterdir(self) -> Iterator[Remote]:
        """The files and folders in this folder, sorted by name."""
        if self.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(self))
        if not self.listing:
            raise FileNotFoundError(errno.ENOENT, _NOTHING, str(self))
        return (self / name for name in sorted(self.listing))

    def glob(self, pattern: str) -> Iterator[Remote]:
        """The files and folders whose names match the pattern, sorted by name."""
        return (self / name for name in sorted(self.listing) if fnmatchcase(name, pattern))

    @cached_property
    def listing(self) -> dict[str, dict[str, Any]]:
        """The store's entries for this folder, by name; empty if this is not a folder."""
        if self._above is not None and not self.is_dir():
            return {}
        try:
            entries = self._ask("ls", self.key, detail=True)
        except FileNotFoundError:
            return {}
        by_name: dict[str, dict[str, Any]] = {}
        for entry in entries:
            address = entry["name"].strip("/")
            name = address.rpartition("/")[2]
            if address == self.key:  # an empty object in place of the folder
                continue
            if name in (".", "..") or _SPECIAL & set(name):
                reason = f"holds {name!r}, which has no address of its own"
                raise StorageError(str(self), reason, "rename it")
            if entry["type"] == "directory" or name not in by_name:
                by_name[name] = entry
        return by_name

    @cached_property
    def _kind(self) -> str | None:
        if self._above is not None:
            known = self._above.listing.get(self.name)
            return None if known is None else str(known["type"])
        try:
            return str(self.info()["type"])
        except FileNotFoundError:
            return None

    @property
    def size(self) -> int:
        """The size of a file in bytes, from the listing of its folder if there is one."""
        known = None if self._above is None else self._above.listing.get(self.name)
        return int((known or self.info())["size"])

    def info(self) -> dict[str, Any]:
        """The store's entry for this file or folder, requested anew."""
        entry: dict[str, Any] = self._ask("info", self.key)
        return entry

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start` on; fewer at its end."""
        plain = _PLAIN.get(self.protocol, {})
        content: bytes = self._ask("cat_file", self.key, start=start, end=start + length, **plain)
        return content

    def create(self) -> AbstractContextManager[IO[bytes]]:
        """A new file in memory, which exists when its block has ended."""
        if self.memory is None:
            raise io.UnsupportedOperation(f"{self} is written by an upload")
        place: Remote | None = self
        while place is not None:  # the new file is missing in earlier listings
            place.__dict__.pop("listing", None)
            place.__dict__.pop("_kind", None)
            place = place._above
        return self.memory.create(self.key)

    def upload(self, file: Path) -> None:
        """Copy a local file to this address."""
        self._ask("put_file", str(file), self.key)

    def remove(self) -> None:
        """Remove the file, if it exists."""
        with suppress(FileNotFoundError):
            self._ask("rm_file", self.key)

    @cached_property
    def _store(self) -> Any:
        """The store in memory, or fsspec's file system for all paths reached from one folder."""
        if self.memory is not None:
            return self.memory
        if self._above is not None:
            return self._above._store
        import fsspec

        # fsspec's cache of listings would outlive the command.
        store = fsspec.filesystem(self.protocol, use_listings_cache=False)
        # Errors are raised. Without a handler, Python would print the log as well.
        library = logging.getLogger(type(store).__module__.partition(".")[0])
        if not library.handlers:
            library.addHandler(logging.NullHandler())
        return store

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the store. Raises FileNotFoundError, or else StorageError."""
        try:
            return getattr(self._store, method)(*args, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _NOTHING, str(self)) from error
        except ImportError as error:
            extra = EXTRAS[self.protocol] or "fsspec"
            raise StorageError(str(self), first_line(error), f"pip install '{extra}'") from error
        except Exception as error:  # each library has its own classes
            cure = "check the address, the credentials and the network"
            raise StorageError(str(self), first_line(error), cure) from error


#: A path on this machine or in a store.
Location = Path | Remote


def normal(place: Location) -> Location:
    """The absolute path without `.` and `..`; links are not resolved."""
    return place if isinstance(place, Remote) else Path(os.path.normpath(place.absolute()))


def is_same_file(one: Location, other: Location) -> bool:
    """Whether two paths are the same file, for example by a link. Raises OSError."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.samefile(other)
    return one == other


def in_order(folder: Location) -> list[Location]:
    """The content of a folder, sorted by name. Raises OSError."""
    inside: list[Location] = list(folder.iterdir())
    return sorted(inside, key=lambda path: path.parts)


def below(place: Location, home: Location) -> tuple[str, ...]:
    """The parts of a path below the folder `home`.

    >>> below(Path("round-01/ann/fedlora.json"), Path("round-01"))
    ('ann', 'fedlora.json')
    """
    return place.parts[len(home.parts) :]


def prefetched(
    function: Callable[[Location], Result], places: Sequence[Location]
) -> Iterator[Callable[[], Result]]:
    """For each place in turn, a call that returns the function's result or raises its error.

    For remote places the function runs ahead, on many places at a time, because most of its time
    is waiting. For a local path it runs when the result is called for.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        ahead = {
            place: pool.submit(function, place) for place in places if isinstance(place, Remote)
        }
        try:
            for place in places:
                yield ahead[place].result if isinstance(place, Remote) else partial(function, place)
        finally:
            for waiting in ahead.values():
                waiting.cancel()
