"""Handing out where it cannot be done: nothing is written then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.adapters import WEIGHTS, Spec, make
from support.distribution import GLOBAL
from support.rounds import SHAPES

from fedlora_cli import (
    DistributeOptions,
    DistributeReport,
    InputError,
    OutputError,
    UsageError,
    distribute,
)


def test_clients_or_ranks_and_not_both(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    client = make(tmp_path, Spec("ann", rank=2, shapes=SHAPES))

    with pytest.raises(UsageError, match="neither --like nor --rank is given; give one of them"):
        distribute(whole.folder, tmp_path / "out")
    with pytest.raises(UsageError, match="given with --rank; give one of them"):
        distribute(
            whole.folder, tmp_path / "out", client.folder, options=DistributeOptions(ranks=(2,))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (32,)}, "--rank: 32, where no module has more than 31 directions"),
        (
            {"ranks": (2,), "alpha": 2e12},
            "--alpha: .* is out of range; it must be a positive number, at most 1e",
        ),
        ({"ranks": (0,)}, "--rank: 0 is out of range"),
        ({"ranks": (2,), "alpha": 0.0}, "--alpha: 0.0 is out of range"),
        ({"ranks": (2,), "jobs": -1}, "--jobs: -1 is out of range"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(tmp_path: Path, options, message: str) -> None:
    whole = make(tmp_path, GLOBAL)

    with pytest.raises(UsageError, match=message):
        distribute(whole.folder, tmp_path / "out", options=DistributeOptions(**options))
    assert not (tmp_path / "out").exists()


def test_an_alpha_that_nobody_would_read_again_is_refused(tmp_path: Path) -> None:
    """The scaling is kept: alpha grows with the rank."""
    whole = make(tmp_path, replace(GLOBAL, rank=1, alpha=1e12))

    with pytest.raises(UsageError, match=r"--alpha: 4e\+12 in rank-4"):
        distribute(whole.folder, tmp_path / "out", options=DistributeOptions(ranks=(4,)))


def test_overflow_names_the_client_and_the_module(tmp_path: Path) -> None:
    whole = make(tmp_path, replace(GLOBAL, alpha=1e12))
    make(tmp_path / "round", Spec("ann", rank=2, alpha=1e-3, shapes=SHAPES))

    options = DistributeOptions(dtype="float16")
    with pytest.raises(
        InputError, match=r"ann: layers\..*: its factors leave the range of float16"
    ):
        distribute(whole.folder, tmp_path / "out", tmp_path / "round", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global", "round"]


def test_clients_of_another_model_are_refused(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    make(tmp_path / "round", Spec("ann", rank=2, shapes={"layers.0.q_proj": (24, 41)}))

    with pytest.raises(InputError, match=r"layers\.0\.q_proj is linear 24 x 4"):
        distribute(whole.folder, tmp_path / "out", tmp_path / "round")


@pytest.mark.parametrize("place", ["round", "round/ann", "round/ann/out", "global/out", "."])
def test_output_inside_or_around_the_input_is_refused(tmp_path: Path, place: str) -> None:
    home = tmp_path / "home"
    whole = make(home, GLOBAL)
    make(home / "round", Spec("ann", rank=2, shapes=SHAPES))

    relation = "contain" if place == "." else "be inside"
    with pytest.raises(InputError, match=f"the output would {relation} the input"):
        distribute(
            whole.folder, home / place, home / "round", replace(DistributeOptions(), force=True)
        )
    assert sorted(path.name for path in home.iterdir()) == ["global", "round"]


def test_output_at_the_place_of_a_linked_client_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    real = make(tmp_path / "elsewhere", Spec("ann", rank=2, shapes=SHAPES))
    (tmp_path / "round").mkdir()
    (tmp_path / "round/ann").symlink_to(real.folder)

    with pytest.raises(InputError, match="contain the input"):
        distribute(
            whole.folder,
            tmp_path / "elsewhere",
            tmp_path / "round/ann",
            DistributeOptions(force=True),
        )
    assert (real.folder / WEIGHTS).exists()


def test_nothing_is_left_behind_when_the_third_adapter_fails(tmp_path: Path, monkeypatch) -> None:
    from fedlora_cli.formats import FORMATS, peft

    written: list[Any] = []

    def full(adapter: Any, folder: Path, provenance: Any) -> Any:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(folder.name)
        return peft.writing(adapter, folder, provenance)

    whole = make(tmp_path, GLOBAL)
    options = DistributeOptions(ranks=(2, 3, 4, 5), jobs=1)
    distribute(whole.folder, tmp_path / "old", options=DistributeOptions(ranks=(6,)))
    monkeypatch.setitem(FORMATS, "peft", replace(FORMATS["peft"], writing=full))

    for out in ("new", "old"):
        written.clear()
        with pytest.raises(OutputError, match="no space left on device"):
            distribute(whole.folder, tmp_path / out, options=replace(options, force=True))
    assert written == ["rank-2", "rank-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global", "old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["rank-6"]


def test_force_replaces_a_folder_of_adapters_and_nothing_else(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    out = tmp_path / "out"

    def hand_out(rank: int, *, force: bool) -> DistributeReport:
        return distribute(whole.folder, out, options=DistributeOptions(ranks=(rank,), force=force))

    hand_out(2, force=False)
    with pytest.raises(OutputError, match="it already exists; choose another folder, or give --f"):
        hand_out(3, force=False)
    hand_out(3, force=True)
    assert [path.name for path in out.iterdir()] == ["rank-3"]
    for foreign in ("notes.txt", "rank-3/optimizer.pt", "rank-9/notes.txt"):
        (out / foreign).parent.mkdir(exist_ok=True)
        (out / foreign).write_text("mine")
        with pytest.raises(OutputError, match=f"it holds {foreign}, which is not part of an"):
            hand_out(4, force=True)
        assert (out / foreign).read_text() == "mine"
        (out / foreign).unlink()
    (out / "link").symlink_to(whole.folder)
    with pytest.raises(OutputError, match="it holds link"):
        hand_out(4, force=True)
    (out / "link").unlink()
    (out / "rank-9").rmdir()
    hand_out(4, force=True)
    assert [path.name for path in out.iterdir()] == ["rank-4"]


def test_an_adapter_is_no_folder_of_adapters(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    other = make(tmp_path, replace(GLOBAL, name="other"))

    with pytest.raises(OutputError, match="other: an adapter, not a folder of adapters"):
        distribute(whole.folder, other.folder, options=DistributeOptions(ranks=(2,), force=True))
