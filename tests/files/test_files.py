"""Safetensors and folders: round trips, exact bytes, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedlora_cli import OutputError
from fedlora_cli.files import folder as folders
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.files.writing import write

FILES = ("x", "x.safetensors", "y")
ALIEN = folders.other_than(FILES)
TENSORS = {
    "base_model.a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "base_model.b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "base_model.c": torch.tensor([[7.0]], dtype=torch.float16),
    "base_model.d": torch.tensor(3),
}


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "fedlora": "{}"})

    entries = read_header(tmp_path / "x.safetensors")

    assert list(entries) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert torch.equal(entries[key].read(), tensor)
        assert entries[key].dtype == str(tensor.dtype).removeprefix("torch.")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "fedlora": "{}"}
        assert all(torch.equal(file.get_tensor(key), TENSORS[key]) for key in TENSORS)


def test_the_bytes_depend_on_the_arguments_alone(tmp_path: Path) -> None:
    """The library alone writes metadata of several keys in random order."""
    metadata = {name: f"{name} 'ρ' \"quoted\" \\ \n" for name in "fedcba"}
    reversed_order = dict(reversed(metadata.items()))
    for number in range(8):
        given = metadata if number % 2 else reversed_order
        write(tmp_path / f"{number}", dict(sorted(TENSORS.items(), reverse=number % 2 == 0)), given)

    assert len({(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata


def test_a_new_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with folders.new_folder(tmp_path / "out", force=True, foreign=ALIEN) as folder:
            write(folder / "x.safetensors", TENSORS, {"format": "pt"})
            (folder / "y").write_text("y")
    finally:
        os.umask(before)

    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    for name in ("x.safetensors", "y"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        with folders.new_folder(tmp_path / "out", force=True, foreign=ALIEN) as folder:
            (folder / "x").write_text(content)

    assert (tmp_path / "out/x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fill(target: Path, content: str, failure: BaseException | None = None) -> None:
    with folders.new_folder(target, force=True, foreign=ALIEN) as folder:
        (folder / "x").write_text(content)
        if failure is not None:
            raise failure


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")

    with pytest.raises(OutputError, match=r"cannot be written \(no space left on device\)"):
        fill(tmp_path / "out", "new", OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", "new", KeyboardInterrupt())

    assert (tmp_path / "out/x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text(""), "a file of that name exists"),
        (lambda path: path.symlink_to(path.parent), "a symbolic link"),
        (lambda path: path.mkdir(), "it already exists"),
    ],
)
def test_a_target_that_is_not_ours_is_refused(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "out")

    with pytest.raises(OutputError, match=message):
        folders.check_target(tmp_path / "out", force=False, foreign=folders.other_than(("x",)))


def test_a_target_without_a_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its parent folder does not exist; mkdir -p"):
        folders.check_target(tmp_path / "no/out", force=False, foreign=folders.other_than(()))
