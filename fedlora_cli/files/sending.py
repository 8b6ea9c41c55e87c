"""Output folders in object storage: made here, then uploaded, the report last.

A store has neither locks nor a folder that takes another's place in one step. What tells a whole
upload from a part of one is the report: it is the first file to go and the last one to come.
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

#: What in a folder could not have been written here: its name, or None.
Foreign = Callable[[Location], str | None]

#: The file without which the others are not to be relied on.
_REPORT = "fedlora.json"

_CURE = "create it, or correct the address"

#: Stores whose addresses begin with a bucket, which must be there.
_WITH_BUCKETS = ("s3", "gs")


def check_upload(target: Remote, *, force: bool, foreign: Foreign) -> None:
    """Whether `target` may be written, as the store has it now. Raises OutputError."""
    if target.protocol == "hf":
        found = "a commit, which nobody can change"
        raise OutputError(target, found, "write to a folder, and upload that")
    now = Remote(target.protocol, target.key)
    try:
        if target.protocol in _WITH_BUCKETS:
            _check_bucket(target)
        if now.is_file():
            raise OutputError(target, "a file of that name exists", "choose another output folder")
        if not now.listing:
            return
        if not force:
            found = "it exists already"
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
    """A temporary folder here, whose files are in the store when the block has ended well.

    What stood there before is removed first, and what came to stand there meanwhile is judged once
    more. Raises OutputError; then what was uploaded is removed again, as far as the store lets us.
    """
    try:
        with temporary_folder("fedlora-") as temporary:
            yield temporary
            check_upload(target, force=force, foreign=foreign)
            _replace(target, temporary)
    except OSError as error:
        raise unwritable(Path(tempfile.gettempdir()), error) from None


def _replace(target: Remote, folder: Path) -> None:
    """Remove what is there, report first; put the files of the folder there, report last."""
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
            found = f"{name} has {sizes[name]} bytes, and {there.get(name, 0)} are there"
            raise OutputError(target, found, "write it once more")
    except BaseException as error:
        left = _taken_back(target, begun)
        if not isinstance(error, OSError):
            raise
        told = unwritable(target, error)
        rest = f"left there: {', '.join(left)}" if left else "nothing is there"
        raise OutputError(target, f"{told.found}; {rest}", told.cure) from None


def _taken_back(target: Remote, names: list[str]) -> list[str]:
    """Remove these files, report first; the names of those that may still be there."""
    left = set(names)
    for name in sorted(names, key=lambda name: not _is_report(name)):
        with suppress(OSError):
            _at(target, name).remove()
            left.discard(name)
    return sorted(left)


def _files(target: Remote) -> dict[str, int]:
    """The size of every file that is there now, in its folders too, by name. Raises OSError."""
    sizes: dict[str, int] = {}
    now = Remote(target.protocol, target.key)
    for name, told in now.listing.items():
        if told["type"] == "directory":
            sizes |= {f"{name}/{inner}": size for inner, size in _files(now / name).items()}
        else:
            sizes[name] = int(told["size"])
    return sizes


def _at(target: Remote, name: str) -> Remote:
    return Remote(target.protocol, f"{target.key}/{name}")


def _is_report(name: str) -> bool:
    return name.rpartition("/")[2] == _REPORT
