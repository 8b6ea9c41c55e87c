"""Output folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.alone import alone_at
from fedlora_cli.files.disk import is_mounted, temporary_folder
from fedlora_cli.files.disk import sync as _sync
from fedlora_cli.files.documents import unwritable
from fedlora_cli.files.sending import Foreign, check_upload, uploaded
from fedlora_cli.remote import Location, Remote, in_order

#: linux/fcntl.h and linux/fs.h: arguments of renameat2(2).
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

#: The end of the name of a folder that is being replaced in two steps.
_OLD = ".old"
#: Between the name of a target and what `tempfile` makes unique.
_TEMPORARY = ".tmp-"
#: What safetensors calls a file until it is complete, and a file like it.
_INCOMPLETE = ".tmp??????"
_TRIAL = ".tmptrials"


def other_than(files: Collection[str]) -> Foreign:
    """Finds what is not a regular file of one of these names."""

    def first(folder: Location) -> str | None:
        strange = (p for p in in_order(folder) if p.name not in files or not p.is_file())
        return next((path.name for path in strange), None)

    return first


def other_than_folders(foreign: Foreign) -> Foreign:
    """Finds what is neither a folder, nor in one and foreign there."""

    def first(folder: Location) -> str | None:
        for child in in_order(folder):
            if child.is_symlink() or not child.is_dir():
                return child.name
            inside = foreign(child)
            if inside is not None:
                return f"{child.name}/{inside}"
        return None

    return first


def check_apart(target: Location, read: Iterable[Location]) -> None:
    """Whether `target` is none of these folders, nor inside one, nor around it.

    Raises InputError.
    """
    place = target.resolve()
    for path in sorted({path.resolve() for path in read}, key=lambda one: one.parts):
        if place == path or path in place.parents or place in path.parents:
            inside = place == path or path in place.parents
            found = f"the output would stand {'inside' if inside else 'around'} the input {path}"
            raise InputError(target, found, "choose a folder beside the clients, not among them")


def check_place(target: Location) -> None:
    """Whether a folder can be made at `target`, or take the place of the one there.

    Looks only, which `claimed` does not. Raises OutputError.
    """
    if isinstance(target, Remote):
        return
    if target.name in ("", ".."):
        raise OutputError(target, "no name of a folder", "name the folder itself")
    if not target.parent.exists():
        raise OutputError(target, "its parent folder does not exist", f"mkdir -p {target.parent}")
    if not target.parent.is_dir():
        raise OutputError(
            target, f"{target.parent} is not a folder", "choose another output folder"
        )
    if target.is_symlink():
        raise OutputError(target, "a symbolic link", "name the folder itself")
    if target.exists() and not target.is_dir():
        raise OutputError(target, "a file of that name exists", "choose another output folder")
    if is_mounted(target):
        raise OutputError(target, "a mounted folder, which cannot be replaced", _inside(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(target, "it may not be changed", "check its permissions")
    if not os.access(target.parent, os.W_OK):
        found = f"{target.parent} may not be changed, or is on a read-only file system"
        raise OutputError(target, found, "check its permissions")


def _inside(target: Path) -> str:
    return f"give a folder inside it, such as {target / 'global'}"


def check_target(target: Location, *, force: bool, foreign: Foreign) -> None:
    """Whether `target` may be written. Raises OutputError, as `check_place` does too.

    An existing folder needs `force`, and even then must hold nothing `foreign`: nothing is ever
    deleted that could not have been written here.
    """
    if isinstance(target, Remote):
        check_upload(target, force=force, foreign=foreign)
        return
    check_place(target)
    if not target.exists():
        return
    if not force:
        raise OutputError(target, "it exists already", "choose another folder, or give --force")
    found = foreign(target)
    if found is not None:
        raise OutputError(
            target,
            f"it holds {found}, which is not part of an adapter",
            "move that away; --force replaces adapters only",
        )


@contextmanager
def claimed(target: Location, *, force: bool, foreign: Foreign) -> Iterator[None]:
    """No other process writes `target` in this block, which is all the work for it.

    What a killed process left of the same target is put in order first. Raises OutputError where
    `check_target` does, where another process is at work there, and where the system would refuse
    to publish the result. A store has no locks: there, nothing is known of others.
    """
    check_target(target, force=force, foreign=foreign)
    if isinstance(target, Remote):
        yield
        return
    with alone_at(target) as alone:
        if alone:
            # Where nothing is known of others, what they are writing may look like what they left.
            with suppress(OSError):
                _sweep(target, foreign)
            check_target(target, force=force, foreign=foreign)
        try:
            _rehearse(target)
        except OSError as error:
            raise unwritable(target, error) from None
        yield


def _rehearse(target: Path) -> None:
    """Publish an empty folder, but for its last step: some file systems rename no folder with files
    in it (gcsfuse), or none that came with a container's image (overlayfs, EXDEV).

    Raises OSError, and OutputError where the folder at `target` could not be replaced.
    """
    with _beside(target) as first, _beside(target) as second:
        (first / _TRIAL).touch()
        second.rmdir()
        first.replace(second)
        if target.exists() and os.name != "nt":
            _check_replaceable(target, second)


def _beside(target: Path) -> AbstractContextManager[Path]:
    return temporary_folder(f".{target.name}{_TEMPORARY}", target.parent)


def _check_replaceable(target: Path, filled: Path) -> None:
    """Whether the folder at `target` could be renamed. It is not: no folder takes the place of one
    with files in it.

    Raises OutputError, and OSError.
    """
    try:
        target.replace(filled)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        reason = (error.strerror or str(error)).lower()
        found = f"the system cannot replace this folder ({reason})"
        raise OutputError(target, found, _inside(target)) from None
    filled.replace(target)  # a file system that breaks the rule


def check_space(target: Location, needed: int) -> None:
    """Whether there is room for that many bytes beside `target`, or where it is made before it is
    uploaded. Raises OutputError.
    """
    place = Path(tempfile.gettempdir()) if isinstance(target, Remote) else target.parent
    try:
        there = shutil.disk_usage(place)
    except OSError as error:
        raise unwritable(target, error) from None
    # Some network file systems tell no sizes.
    if there.total and needed > there.free:
        found = f"{needed:,} bytes are needed, and {there.free:,} are free"
        if isinstance(target, Remote):
            raise OutputError(place, found, "free some space, or set TMPDIR to another disk")
        raise OutputError(target, found, "free some space, or choose another disk")


@contextmanager
def new_folder(target: Location, *, force: bool, foreign: Foreign) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well; or is
    uploaded then.

    The files are on the disk before the name is; whoever looks sees the old folder or the new one.
    What came to stand at `target` meanwhile is judged by `check_target` once more. On any failure
    the temporary folder is removed. Raises OutputError.
    """
    if isinstance(target, Remote):
        with uploaded(target, force=force, foreign=foreign) as folder:
            yield folder
        return
    try:
        # After a success, only the folder that was replaced, if any, is left in the temporary one's
        # place.
        with _beside(target) as temporary:
            yield temporary
            _settle(temporary)
            check_target(target, force=force, foreign=foreign)
            _publish(temporary, target)
            _record(target)
    except OSError as error:
        raise unwritable(target, error) from None


def _sweep(target: Path, foreign: Foreign) -> None:
    """Remove the temporary folders that killed processes left, and what they were replacing.

    Only folders that hold nothing `foreign`. One that was being replaced, and whose place is still
    free, is the only whole one that there is: it gets its name back. Raises OSError.
    """
    ours = re.compile(re.escape(f".{target.name}{_TEMPORARY}") + rf"\w{{8}}({re.escape(_OLD)})?")
    for path in sorted(target.parent.iterdir()):
        if not ours.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        if path.suffix == _OLD and not target.exists():
            path.rename(target)
            continue
        for incomplete in path.rglob(_INCOMPLETE):
            if incomplete.is_file():
                incomplete.unlink()
        if foreign(path) is None:
            shutil.rmtree(path, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Ordinary permissions (temporary files are private), and everything on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            _settle(path)
        else:
            path.chmod(0o666 & ~umask)
            _sync(path)
    folder.chmod(0o777 & ~umask)
    _sync(folder)


def _publish(temporary: Path, target: Path) -> None:
    """Give the folder its name; a folder that had it ends up under the temporary name."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        # Two steps where the system cannot exchange names: for a moment there is no target.
        old = temporary.with_name(temporary.name + _OLD)
        try:
            target.rename(old)
            temporary.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        with suppress(OSError):  # or the next one of the same target removes it
            old.rename(temporary)


def _record(target: Path) -> None:
    """Have the name of a folder that is there on the disk. Raises OutputError."""
    # A parent that may not be read keeps its entry in its own time.
    try:
        with suppress(PermissionError):
            _sync(target.parent)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        found = f"it is there and whole, but perhaps not for long: {target.parent} ({reason})"
        raise OutputError(target, found, "check the disk, and copy it elsewhere") from None


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system can (Linux 3.15 and glibc 2.28 or newer)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)
