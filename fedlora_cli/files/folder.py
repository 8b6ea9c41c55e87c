"""Output folders that appear whole or not at all."""

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

#: Suffix of a folder that is being replaced in two steps.
_OLD = ".old"
#: Between the name of the target and the random part of a temporary folder's name.
_TEMPORARY = ".tmp-"
#: The library's name for a file that is not complete, and the name of a trial file.
_INCOMPLETE = ".tmp??????"
_TRIAL = ".tmptrials"


def other_than(files: Collection[str]) -> Foreign:
    """A check for folders: the first entry that is not a regular file of these names."""

    def first(folder: Location) -> str | None:
        strange = (p for p in in_order(folder) if p.name not in files or not p.is_file())
        return next((path.name for path in strange), None)

    return first


def other_than_folders(foreign: Foreign) -> Foreign:
    """A check for folders of folders: the first entry that `foreign` does not accept."""

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
    """Raise InputError if `target` is an input folder, lies inside one, or contains one."""
    place = target.resolve()
    for path in sorted({path.resolve() for path in read}, key=lambda path: path.parts):
        if place == path or path in place.parents or place in path.parents:
            inside = place == path or path in place.parents
            found = f"the output would {'be inside' if inside else 'contain'} the input {path}"
            raise InputError(target, found, "choose a folder beside the clients, not among them")


def check_place(target: Location) -> None:
    """Raise OutputError if no folder can be created at `target`, or replaced there.

    Writes nothing, unlike `claimed`.
    """
    if isinstance(target, Remote):
        return
    if target.name in ("", ".."):
        raise OutputError(target, "not the name of a folder", "give the folder's own name")
    if not target.parent.exists():
        raise OutputError(target, "its parent folder does not exist", f"mkdir -p {target.parent}")
    if not target.parent.is_dir():
        raise OutputError(
            target, f"{target.parent} is not a folder", "choose another output folder"
        )
    if target.is_symlink():
        raise OutputError(target, "a symbolic link", "give the folder that it leads to")
    if target.exists() and not target.is_dir():
        raise OutputError(target, "a file of that name exists", "choose another output folder")
    if is_mounted(target):
        raise OutputError(target, "a mounted folder, which cannot be replaced", _inside(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(target, "not writable", "check its permissions")
    if not os.access(target.parent, os.W_OK):
        found = f"{target.parent} is not writable, or on a read-only file system"
        raise OutputError(target, found, "check its permissions")


def _inside(target: Path) -> str:
    return f"give a folder inside it, such as {target / 'global'}"


def check_target(target: Location, *, force: bool, foreign: Foreign) -> None:
    """Raise OutputError if `target` may not be written, as `check_place` does too.

    An existing folder needs `force`, and must hold nothing `foreign`: only files that fedlora can
    have written are ever deleted.
    """
    if isinstance(target, Remote):
        check_upload(target, force=force, foreign=foreign)
        return
    check_place(target)
    if not target.exists():
        return
    if not force:
        raise OutputError(target, "it already exists", "choose another folder, or give --force")
    found = foreign(target)
    if found is not None:
        raise OutputError(
            target,
            f"it holds {found}, which is not part of an adapter",
            "move that away; --force replaces adapters only",
        )


@contextmanager
def claimed(target: Location, *, force: bool, foreign: Foreign) -> Iterator[None]:
    """Reserve `target` for the block, in which the output is computed and written.

    Files that a killed process left for the same target are removed first. Raises OutputError as
    `check_target` does, if another process writes there, and if the system would refuse to publish
    the result. A store has no locks, so there other processes are not noticed.
    """
    check_target(target, force=force, foreign=foreign)
    if isinstance(target, Remote):
        yield
        return
    with alone_at(target) as alone:
        if alone:
            # Without a lock, the temporary folder of a running process might be removed.
            with suppress(OSError):
                _sweep(target, foreign)
            check_target(target, force=force, foreign=foreign)
        try:
            _rehearse(target)
        except OSError as error:
            raise unwritable(target, error) from None
        yield


def _rehearse(target: Path) -> None:
    """Try the steps of publishing, except the last, on an empty folder.

    Some file systems do not rename folders with files in them (gcsfuse), or folders that are part
    of a container's image (overlayfs, EXDEV). Raises OSError, and OutputError if the folder at
    `target` could not be replaced.
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
    """Raise OutputError or OSError if the folder at `target` could not be renamed.

    Renaming it onto `filled` fails without effect, because `filled` is not empty.
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
    filled.replace(target)  # some file systems break this rule


def check_space(target: Location, needed: int) -> None:
    """Raise OutputError if there are fewer than `needed` bytes free where `target` is written."""
    if isinstance(target, Remote) and target.memory is not None:
        return
    place = Path(tempfile.gettempdir()) if isinstance(target, Remote) else target.parent
    try:
        there = shutil.disk_usage(place)
    except OSError as error:
        raise unwritable(target, error) from None
    # Some network file systems report no sizes.
    if there.total and needed > there.free:
        found = f"{needed:,} bytes needed, {there.free:,} free"
        if isinstance(target, Remote):
            raise OutputError(place, found, "free some space, or set TMPDIR to another disk")
        raise OutputError(target, found, "free some space, or choose another disk")


@contextmanager
def new_folder(target: Location, *, force: bool, foreign: Foreign) -> Iterator[Location]:
    """A temporary folder that replaces `target`, or is uploaded to it, if the block succeeds.

    A folder in memory is written in place, because its store ends with the call that failed.

    The files are flushed before the folder is renamed, so a reader sees the old folder or the new
    one. `check_target` runs again before that. On failure the temporary folder is removed. Raises
    OutputError.
    """
    if isinstance(target, Remote) and target.memory is not None:
        yield target
        return
    if isinstance(target, Remote):
        with uploaded(target, force=force, foreign=foreign) as folder:
            yield folder
        return
    try:
        # After a success, the temporary name belongs to the folder that was replaced, if any.
        with _beside(target) as temporary:
            yield temporary
            _settle(temporary)
            check_target(target, force=force, foreign=foreign)
            _publish(temporary, target)
            _record(target)
    except OSError as error:
        raise unwritable(target, error) from None


def _sweep(target: Path, foreign: Foreign) -> None:
    """Remove temporary folders of `target` that killed processes left.

    Folders that hold anything `foreign` stay. A folder that was being replaced gets its name back
    if the new one is not there. Raises OSError.
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
    """Set ordinary permissions (temporary files are private) and flush everything to the disk."""
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
        # Two steps if the system cannot exchange names: between them there is no target.
        old = temporary.with_name(temporary.name + _OLD)
        try:
            target.rename(old)
            temporary.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        with suppress(OSError):  # the next run removes it otherwise
            old.rename(temporary)


def _record(target: Path) -> None:
    """Flush the name of a published folder to the disk. Raises OutputError."""
    # A parent folder without read permission cannot be flushed.
    try:
        with suppress(PermissionError):
            _sync(target.parent)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        found = f"complete, but not safely on the disk: {target.parent} ({reason})"
        raise OutputError(target, found, "check the disk, and copy it elsewhere") from None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically. False if the system cannot (before Linux 3.15, glibc 2.28)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)
