"""Output folders in object storage: written locally, then uploaded, the report last.

A store has no locks and cannot replace a folder atomically. The report marks a complete upload: it
is removed first and uploaded last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlora_cli.errors import OutputError
from fedlora_cli.files.disk import temporary_folder
from fedlora_cli.files.documents import unwritable
from fedlora_cli.remote import Location, Remote

#: Returns the name of an entry in a folder that fedlora cannot have written, or None.
Foreign = Callable[[Location], str | None]

#: The file that marks a complete upload.
_REPORT = "fedlora.json"

_CURE = "create it, or correct the address"

#: Stores whose addresses begin with a bucket, which must exist.
_WITH_BUCKETS = ("s3", "gs")


def check_upload(target: Remote, *, force: bool, foreign: Foreign) -> None:
    """Raise OutputError if `target` may not be written in the store's present state."""
    if target.protocol == "hf":
        found = "a commit, which cannot be changed"
        raise OutputError(target, found, "write to a folder, and upload that")
    now = target.unlisted
    try:
        if target.protocol in _WITH_BUCKETS:
            _check_bucket(target)
        if now.is_file():
            raise OutputError(target, "a file of that name exists", "choose another output folder")
        if not now.listing:
            return
        if not force:
            found = "it already exists"
            raise OutputError(target, found, "choose another folder, or give --force")
        strange = foreign(now)
    except OSError as error:
        raise unwritable(target, error) from None
    if strange is not None:
        found = f"it holds {strange}, which is not part of an adapter"
        raise OutputError(target, found, "move that away; --force replaces adapters only")


def _check_bucket(target: Remote) -> None:
    bucket = target.parents[-1] if target.parents else target
    try:
        bucket.info()
    except FileNotFoundError:
        raise OutputError(target, f"there is no bucket {bucket.name}", _CURE) from None


@contextmanager
def uploaded(target: Remote, *, force: bool, foreign: Foreign) -> Iterator[Path]:
    """A local temporary folder whose files are uploaded if the block succeeds.

    `check_upload` runs again, and the old files are removed, before the upload. Raises OutputError;
    the files uploaded so far are then removed, as far as the store allows.
    """
    try:
        with temporary_folder("fedlora-") as temporary:
            yield temporary
            check_upload(target, force=force, foreign=foreign)
            _replace(target, temporary)
    except OSError as error:
        raise unwritable(Path(tempfile.gettempdir()), error) from None


def _replace(target: Remote, folder: Path) -> None:
    """Remove the old files, report first; upload the files of the folder, report last."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    sizes = {name: path.stat().st_size for name, path in zip(names, files, strict=True)}
    begun: list[str] = []
    try:
        for old in sorted(_files(target), key=lambda name: not _is_report(name)):
            _at(target, old).remove()
        for name in sorted(sizes, key=lambda name: (_is_report(name), name)):
            begun.append(name)
            _at(target, name).upload(folder / name)
        there = _files(target)
        wrong = [name for name in sizes if there.get(name) != sizes[name]]
        if wrong:
            name = wrong[0]
            found = f"{name} has {there.get(name, 0)} bytes in the store, not {sizes[name]}"
            raise OutputError(target, found, "run the command again")
    except BaseException as error:
        left = _taken_back(target, begun)
        if not isinstance(error, OSError):
            raise
        fault = unwritable(target, error)
        rest = f"left there: {', '.join(left)}" if left else "nothing is left there"
        raise OutputError(target, f"{fault.found}; {rest}", fault.cure) from None


def _taken_back(target: Remote, names: list[str]) -> list[str]:
    """Remove these files, report first. Returns the names of those that may still exist."""
    left = set(names)
    for name in sorted(names, key=lambda name: not _is_report(name)):
        with suppress(OSError):
            _at(target, name).remove()
            left.discard(name)
    return sorted(left)


def _files(target: Remote) -> dict[str, int]:
    """The size of each file in the store, by its path below `target`. Raises OSError."""
    sizes: dict[str, int] = {}
    now = target.unlisted
    for name, entry in now.listing.items():
        if entry["type"] == "directory":
            sizes |= {f"{name}/{inner}": size for inner, size in _files(now / name).items()}
        else:
            sizes[name] = int(entry["size"])
    return sizes


def _at(target: Remote, name: str) -> Remote:
    return Remote(target.protocol, f"{target.key}/{name}")


def _is_report(name: str) -> bool:
    return name.rpartition("/")[2] == _REPORT
