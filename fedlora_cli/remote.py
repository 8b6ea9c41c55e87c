"""A place in object storage, named by URL, in those of pathlib's words that readers use.

Stores are reached through fsspec (https://filesystem-spec.readthedocs.io), which comes with torch,
and find their credentials themselves, in the environment or their own files.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fedlora_cli.text import first_line

Result = TypeVar("Result")

#: What to install for the URLs that begin so; None where nothing is needed.
EXTRAS = {"s3": "fedlora[s3]", "gs": "fedlora[gcs]", "hf": None, "memory": None}

#: Questions that wait for their answers at the same time.
_AT_ONCE = 16

#: Letters that mean something else than themselves in the address of an object.
_SPECIAL = frozenset("?#")

#: Of a store whose library reads ahead, what makes it read what was asked for.
_PLAIN = {"hf": {"cache_type": "none"}}

_NOTHING = "nothing is there, or no such bucket"


class StorageError(OSError):
    """What a store said about the place of that URL, on one line, and what to do about it."""

    def __init__(self, where: str, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.where, self.cure = where, cure

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, str]]:
        return type(self), (self.where, str(self), self.cure)


class Remote:
    """A file or folder of a store: `key` is its address after the `protocol`, bucket first.

    A folder is asked once for what it holds, when that is first of interest, and so are all that
    are reached from it by `/`: one command sees one state of it. All methods that ask raise
    OSError.

    >>> ann = Remote("s3", "bucket/round-01") / "ann"
    >>> str(ann), ann.name, ann.parent.name
    ('s3://bucket/round-01/ann', 'ann', 'round-01')
    """

    def __init__(self, protocol: str, key: str, above: Remote | None = None) -> None:
        self.protocol, self._path, self._above = protocol, PurePosixPath(key), above
        self._below: dict[str, Remote] = {}

    def __str__(self) -> str:
        return f"{self.protocol}://{self.key}"

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[type[Remote], tuple[str, str]]:
        """Another process gets the address alone, and asks again."""
        return type(self), (self.protocol, self.key)

    def __truediv__(self, name: str) -> Remote:
        if name not in self._below:
            self._below[name] = Remote(self.protocol, str(self._path / name), self)
        return self._below[name]

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
        return self._above or Remote(self.protocol, str(self._path.parent))

    @property
    def parents(self) -> tuple[Remote, ...]:
        above = self._path.parents[:-1]  # the last one is the store itself
        return tuple(Remote(self.protocol, str(one)) for one in above)

    def resolve(self) -> Remote:
        """The same: there are no links."""
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
        """What is in a folder, by name."""
        if self.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(self))
        if not self.listing:
            raise FileNotFoundError(errno.ENOENT, _NOTHING, str(self))
        return (self / name for name in sorted(self.listing))

    def glob(self, pattern: str) -> Iterator[Remote]:
        """What in a folder has a name that the pattern fits."""
        return (self / name for name in sorted(self.listing) if fnmatchcase(name, pattern))

    @cached_property
    def listing(self) -> dict[str, dict[str, Any]]:
        """What the store tells of everything in this folder, by name; nothing where it is none."""
        if self._above is not None and not self.is_dir():
            return {}
        try:
            told = self._ask("ls", self.key, detail=True)
        except FileNotFoundError:
            return {}
        found: dict[str, dict[str, Any]] = {}
        for one in told:
            address = one["name"].strip("/")
            name = address.rpartition("/")[2]
            if address == self.key:  # an empty object that stands for the folder
                continue
            if name in (".", "..") or _SPECIAL & set(name):
                reason = f"holds {name!r}, which has no address of its own"
                raise StorageError(str(self), reason, "rename it")
            if one["type"] == "directory" or name not in found:
                found[name] = one
        return found

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
        """Of a file, as the folder that it was reached from lists it."""
        known = None if self._above is None else self._above.listing.get(self.name)
        return int((known or self.info())["size"])

    def info(self) -> dict[str, Any]:
        """What the store tells of it now."""
        told: dict[str, Any] = self._ask("info", self.key)
        return told

    def read(self, start: int, length: int) -> bytes:
        """So many bytes of a file, from `start` on; fewer where it ends."""
        plain = _PLAIN.get(self.protocol, {})
        content: bytes = self._ask("cat_file", self.key, start=start, end=start + length, **plain)
        return content

    def upload(self, file: Path) -> None:
        """Put the content of a local file here."""
        self._ask("put_file", str(file), self.key)

    def remove(self) -> None:
        """Remove a file, if there is one."""
        with suppress(FileNotFoundError):
            self._ask("rm_file", self.key)

    @cached_property
    def _store(self) -> Any:
        """fsspec's file system, one for all that is reached from one folder."""
        if self._above is not None:
            return self._above._store
        import fsspec

        # Its own listings would outlive a command. There are ours.
        store = fsspec.filesystem(self.protocol, use_listings_cache=False)
        # What goes wrong is raised. A log that nobody handles would be printed besides.
        library = logging.getLogger(type(store).__module__.partition(".")[0])
        if not library.handlers:
            library.addHandler(logging.NullHandler())
        return store

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        """What the store answers. Raises FileNotFoundError, and else StorageError."""
        try:
            return getattr(self._store, method)(*args, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _NOTHING, str(self)) from error
        except ImportError as error:
            extra = EXTRAS[self.protocol] or "fsspec"
            raise StorageError(str(self), first_line(error), f"pip install '{extra}'") from error
        except Exception as error:  # every library has kinds of its own
            cure = "check the address, the credentials and the network"
            raise StorageError(str(self), first_line(error), cure) from error


#: What commands read from and write to.
Location = Path | Remote


def normal(place: Location) -> Location:
    """The place without `.` and `..` in it, links not resolved: it has a name of its own."""
    return place if isinstance(place, Remote) else Path(os.path.normpath(place.absolute()))


def is_same_file(one: Location, other: Location) -> bool:
    """Whether two names are of one file, by a link for example. Raises OSError."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.samefile(other)
    return one == other


def in_order(folder: Location) -> list[Location]:
    """What is in a folder, by name. Raises OSError."""
    inside: list[Location] = list(folder.iterdir())
    return sorted(inside, key=lambda one: one.parts)


def below(place: Location, home: Location) -> tuple[str, ...]:
    """The names that lead from `home` to a place in it.

    >>> below(Path("round-01/ann/fedlora.json"), Path("round-01"))
    ('ann', 'fedlora.json')
    """
    return place.parts[len(home.parts) :]


def prefetched(
    function: Callable[[Location], Result], places: Sequence[Location]
) -> Iterator[Callable[[], Result]]:
    """For every place in turn, what gives the function's result or raises its error.

    A file here is read when that is called. Stores are asked ahead, many questions at a time, as
    most of the time goes by in waiting for answers.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        ahead = {one: pool.submit(function, one) for one in places if isinstance(one, Remote)}
        try:
            for one in places:
                yield ahead[one].result if isinstance(one, Remote) else partial(function, one)
        finally:
            for waiting in ahead.values():
                waiting.cancel()
