"""Adapter folders in what the person named: which are found, and where their links may lead."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.cli
from support.adapters import Spec, make
from support.damage import CONFIG, WEIGHTS

from fedlora_cli import InputError, read_clients
from fedlora_cli.clients import discovery as uploads

run = partial(support.cli.run, "aggregate")


@pytest.mark.parametrize("name", ["nowhere", "empty", "file.txt"])
def test_a_place_without_adapters_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()

    result = run(str(tmp_path / name), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert name in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    """As for anybody but root, to whom no permission is denied."""
    make(tmp_path / "round", Spec("a", rank=2))

    def closed(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(uploads.os, "scandir", closed)
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "round: cannot be read (permission denied); check the path" in result.stderr


def test_a_folder_that_may_not_be_entered_is_refused(tmp_path: Path, monkeypatch) -> None:
    """As for anybody but root, to whom no permission is denied."""
    make(tmp_path / "round", Spec("a", rank=2))
    closed = tmp_path / "round/a"
    really = Path.stat

    def stat(path: Path, **kwargs: Any) -> os.stat_result:
        if path.parent == closed:
            raise PermissionError(13, "Permission denied")
        return really(path, **kwargs)

    monkeypatch.setattr(Path, "stat", stat)
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "a/adapter_config.json: cannot be read (permission denied)" in result.stderr


def test_a_folder_without_an_adapter_among_the_clients_is_named(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    (tmp_path / "round/logs").mkdir()
    (tmp_path / "round/.out.tmp-1").mkdir()

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "logs left out: no adapter in it" in result.stderr
    assert "tmp-1" not in result.stderr


def test_a_folder_one_level_too_high_is_told_from_an_empty_one(tmp_path: Path) -> None:
    make(tmp_path / "runs/round", Spec("a", rank=2))

    result = run(str(tmp_path / "runs"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert f"did you mean {tmp_path}/runs/round?" in result.stderr


def names_of(*places: Path) -> tuple[str, ...]:
    return read_clients(list(places)).cohort.names


def test_a_folder_named_on_the_command_line_may_be_a_link(tmp_path: Path) -> None:
    make(tmp_path / "disk", Spec("a", rank=2))
    (tmp_path / "one").symlink_to("disk/a")
    (tmp_path / "round").symlink_to("disk")

    assert names_of(tmp_path / "one") == ("one",)
    assert names_of(tmp_path / "round") == ("a",)


def test_links_may_lead_elsewhere_in_the_folder_that_was_named(tmp_path: Path) -> None:
    make(tmp_path / "round/uploads", Spec("17", rank=2))
    shutil.move(tmp_path / "round/uploads", tmp_path / "round/.uploads")
    (tmp_path / "round/a").symlink_to(".uploads/17")
    make(tmp_path / "round", Spec("b", rank=2))
    (tmp_path / "round/b" / CONFIG).unlink()
    (tmp_path / "round/b" / CONFIG).symlink_to(tmp_path / "round/.uploads/17" / CONFIG)

    assert names_of(tmp_path / "round") == ("a", "b")
    with pytest.raises(InputError, match=f"{CONFIG}: a link that leads out of the folder"):
        names_of(tmp_path / "round/b")


def cached(home: Path, name: str) -> Path:
    """An adapter as `huggingface_hub` keeps it: links to files named by their digest."""
    made = make(home, Spec(name, rank=2, samples=None))
    blobs, snapshot = home / "blobs", home / "snapshots" / name
    blobs.mkdir(exist_ok=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(made.folder.iterdir())):
        file.rename(blobs / f"{name}{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{name}{number}")
    made.folder.rmdir()
    return snapshot


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    home = tmp_path / "models--me--it"
    snapshot = cached(home, "1f")
    cached(home, "2f")

    assert names_of(snapshot) == ("1f",)
    assert names_of(home / "snapshots") == ("1f", "2f")

    elsewhere = cached(tmp_path / "models--you--it", "3f")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to((elsewhere / CONFIG).resolve())
    with pytest.raises(InputError, match="a link that leads out of the folder"):
        names_of(snapshot)


def test_blobs_that_are_a_link_themselves_are_no_way_out(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "evil", "1f")
    (tmp_path / "evil/blobs").rename(tmp_path / "secret")
    (tmp_path / "evil/blobs").symlink_to("../secret")

    with pytest.raises(InputError, match=r"a link that leads out of the folder, to .*/secret/1f"):
        names_of(snapshot)


def test_links_that_are_not_read_with_the_adapter_are_looked_at_too(tmp_path: Path) -> None:
    made = make(tmp_path, Spec("a", rank=2))
    (made.folder / "latest").symlink_to("/tmp")
    assert names_of(made.folder) == ("a",)

    (made.folder / "all_results.json").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"all_results\.json: a link that leads out of the folder"):
        names_of(made.folder)


def test_a_folder_of_too_many_is_refused_before_it_is_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_ENTRIES", 30)
    make(tmp_path / "round", Spec("zoe", rank=2))
    for number in range(29):
        (tmp_path / f"round/{number}").mkdir()
    assert names_of(tmp_path / "round") == ("zoe",)

    (tmp_path / "round/29").mkdir()
    with pytest.raises(InputError, match="round: more than 30 files and folders in it; name the"):
        names_of(tmp_path / "round")


def test_of_many_folders_without_an_adapter_a_few_are_named(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("zoe", rank=2))
    for number in range(200):
        (tmp_path / f"round/{number}").mkdir()

    remarks = read_clients([tmp_path / "round"]).remarks

    assert "180 more folders left out: no adapter in them" in remarks
    assert len(remarks) == 21


def test_weights_of_one_file_are_refused_as_one_vote(tmp_path: Path) -> None:
    """A copy has a vote of its own, and is told; a link is nobody's upload."""
    one, other = (make(tmp_path / "round", Spec(name, rank=2)) for name in "ab")
    (other.folder / WEIGHTS).unlink()
    os.link(one.folder / WEIGHTS, other.folder / WEIGHTS)

    with pytest.raises(InputError, match=f"b/{WEIGHTS}: the same file as .*a/{WEIGHTS}"):
        names_of(tmp_path / "round")
