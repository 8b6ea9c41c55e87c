"""Outputs where the file system is another one: mounted folders, disks that cannot be flushed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.outputs import beside, never, whole
from support.rounds import make_round

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.errors import FedloraError, OutputError
from fedlora_cli.files import disk, folder
from fedlora_cli.files.output import check_file, write_file
from fedlora_cli.rounds.aggregate import aggregate
from fedlora_cli.rounds.distribute import distribute
from fedlora_cli.rounds.options import DistributeOptions

NO_SYNC = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A round, and the global adapter `old` that was made of it."""
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flexlora"))
    return tmp_path


def mount(*arguments: str | Path) -> None:
    command = ["mount", *map(str, arguments)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@pytest.fixture(params=["tmpfs", "bind", "bind of an adapter"])
def mounted(request, here: Path) -> Iterator[Path]:
    """A folder that is a mount: of another disk, or of the same one, empty or with an adapter."""
    place, source = here / "a mount", here / "source"
    place.mkdir()
    source.mkdir()
    if request.param == "tmpfs":
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    elif request.param == "bind":
        mount("--bind", source, place)
    else:
        mount("--bind", here / "out", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize(
    "options", [AggregateOptions(), AggregateOptions(force=True), AggregateOptions(dry_run=True)]
)
def test_a_mounted_folder_is_refused_before_the_work(
    mounted: Path, options: AggregateOptions
) -> None:
    before = sorted(mounted.iterdir())

    wanted = f"a mounted folder, which cannot be replaced; give a folder inside it.*{mounted.name}"
    with pytest.raises(OutputError, match=wanted):
        aggregate([mounted.with_name("round")], mounted, options, never)
    handed = DistributeOptions(ranks=(1,), force=True)
    with pytest.raises(OutputError, match=f"{wanted}|an adapter, not a folder of adapters"):
        distribute(mounted.with_name("out"), mounted, (), handed, never)
    assert sorted(mounted.iterdir()) == before


def test_the_way_out_of_a_mounted_folder_works(mounted: Path) -> None:
    aggregate([mounted.with_name("round")], mounted / "global")
    aggregate([mounted.with_name("round")], mounted / "global", AggregateOptions(force=True))

    whole(mounted / "global")


def test_a_mounted_file_is_no_place_for_a_picture(tmp_path: Path) -> None:
    (tmp_path / "plot.png").touch()
    mount("--bind", tmp_path / "plot.png", tmp_path / "plot.png")
    try:
        with pytest.raises(OutputError, match="a mounted file, which cannot be replaced"):
            check_file(tmp_path / "plot.png", "--plot", (".png",))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "plot.png")], check=True)


def test_a_folder_that_is_no_mount_is_none(tmp_path: Path) -> None:
    assert not disk.is_mounted(tmp_path)
    assert not disk.is_mounted(tmp_path / "none")
    assert disk.is_mounted(Path("/"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it in a file")
def test_mounts_are_known_by_their_names_with_blanks(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a b").mkdir()
    line = f"36 35 98:0 / {tmp_path}/a\\040b rw - ext4 /dev/root rw\n"
    (tmp_path / "mountinfo").write_text(line)
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mountinfo")

    assert disk.is_mounted(tmp_path / "a b")
    assert not disk.is_mounted(tmp_path)


def refusing(number: int, kind: Callable[[int], bool]) -> Callable[[int], None]:
    """`os.fsync` of a file system that refuses it for some files."""
    really = os.fsync

    def fsync(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        really(descriptor)

    return fsync


@pytest.mark.parametrize("number", NO_SYNC)
@pytest.mark.parametrize("kind", [stat.S_ISDIR, lambda mode: True], ids=["folders", "all"])
def test_what_cannot_be_flushed_is_written_all_the_same(
    here: Path, monkeypatch, number: int, kind: Callable[[int], bool]
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number, kind))

    aggregate([here / "round"], here / "out", AggregateOptions(force=True))
    distribute(here / "out", here / "handed", (), DistributeOptions(ranks=(1, 2)))
    write_file(here / "plot.png", b"a picture")
    monkeypatch.undo()
    whole(here / "out")
    assert {path.name for path in (here / "handed").iterdir()} == {"rank-1", "rank-2"}
    assert (here / "plot.png").read_bytes() == b"a picture"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_where_only_the_name_is_not_on_the_disk_that_is_said(
    here: Path, monkeypatch, number: int
) -> None:
    before = whole(here / "out")
    really = folder._sync

    def sync(path: Path) -> None:
        if path == here:
            raise OSError(number, os.strerror(number))
        really(path)

    monkeypatch.setattr(folder, "_sync", sync)
    with pytest.raises(OutputError, match="complete, but not safely on the disk") as caught:
        aggregate([here / "round"], here / "out", AggregateOptions(force=True))
    monkeypatch.undo()
    assert os.strerror(number).lower() in str(caught.value)
    assert caught.value.exit_code == 4
    assert whole(here / "out") != before
    assert beside(here / "out") == set()


def refused_renames(number: int, refused: Callable[[Path, Path], bool]) -> dict[str, Any]:
    """`Path.rename` and `replace` of a file system that refuses some of them."""

    def make(really: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        def move(self: Path, target: Path) -> Path:
            if refused(self, Path(target)):
                raise OSError(number, os.strerror(number))
            return really(self, target)

        return move

    return {name: make(getattr(Path, name)) for name in ("rename", "replace")}


@pytest.mark.parametrize(
    ("number", "only"),
    [(errno.EXDEV, "out"), (errno.EBUSY, "out"), (errno.ENOTSUP, None), (errno.EPERM, None)],
)
def test_a_rename_that_will_be_refused_is_known_before_the_work(
    here: Path, monkeypatch, number: int, only: str | None
) -> None:
    """Of the folder that is there, as in overlayfs, or of any with files in it, as in gcsfuse."""
    before = whole(here / "out")
    moves = refused_renames(
        number, lambda one, _: one.name == only or (only is None and any(one.iterdir()))
    )
    for name, move in moves.items():
        monkeypatch.setattr(Path, name, move)

    with pytest.raises(OutputError, match=os.strerror(number).lower()) as caught:
        aggregate([here / "round"], here / "out", AggregateOptions(force=True), never)
    assert ("give a folder inside it" in str(caught.value)) == (only is not None)
    monkeypatch.undo()
    assert whole(here / "out") == before
    assert beside(here / "out") == set()


def test_a_file_system_that_replaces_what_is_not_empty_loses_nothing(
    here: Path, monkeypatch
) -> None:
    before = whole(here / "out")
    really = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if Path(target).is_dir():
            shutil.rmtree(target)
        return really(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    aggregate([here / "round"], here / "out", AggregateOptions(force=True))
    assert whole(here / "out") != before
    assert beside(here / "out") == set()


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [("none/out", "its parent folder does not exist"), ("file", "a file of that name"),
     ("link", "a symbolic link"), ("locked/out", "is not writable, or on a read-only")],
)  # fmt: skip
def test_a_dry_run_knows_where_nothing_can_be_written(
    here: Path, monkeypatch, name: str, message: str, dry: bool
) -> None:
    (here / "file").touch()
    (here / "link").symlink_to(here / "out")
    (here / "locked").mkdir()
    really = os.access  # root may do everything
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "locked" and really(path, mode)
    )

    with pytest.raises(FedloraError, match=message) as caught:
        aggregate([here / "round"], here / name, AggregateOptions(dry_run=dry), never)
    assert caught.value.exit_code == 4
