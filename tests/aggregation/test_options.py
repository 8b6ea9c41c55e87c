"""Choices that contradict each other, and numbers out of range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.adapters import Spec, make
from support.rounds import ROUND, make_round

from fedlora_cli import AggregateOptions, InputError, UsageError, aggregate, location


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "flora", "rank": 3}, "flora does not truncate"),
        ({"method": "fedavg", "energy": 0.9}, "fedavg does not truncate"),
        ({"method": "rbla", "momentum": 0.5}, "without two earlier global adapters"),
        ({"method": "flexlora", "quorum": 0.5}, "the rule of flexlora has no quorum"),
        ({"momentum": 0.5}, "without two earlier global adapters"),
        ({"rank": 99}, "no module has more than 31 directions"),
        ({"method": "rbla", "basis": "svd"}, "rbla averages factors"),
        ({"device": "abacus"}, "abacus cannot be used; give cpu, cuda, cuda:N or auto"),
        ({"device": "mps:9"}, "mps:9 cannot be used; give cpu, cuda, cuda:N or auto"),
    ],
)
def test_choices_that_contradict_each_other_are_usage_errors(
    tmp_path: Path, options, message
) -> None:
    make_round(tmp_path)

    with pytest.raises(UsageError, match=message):
        aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["previous", "before_previous", "rounds", "samples"])
def test_places_may_be_text(name: str) -> None:
    given: dict[str, Any] = {name: "round/global"}
    assert getattr(AggregateOptions(**given), name) == Path("round/global")
    given = {name: "s3://bucket/global"}
    assert getattr(AggregateOptions(**given), name) == location("s3://bucket/global")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"momentum": 1.0},
        {"quorum": -0.1},
        {"jobs": -1},
        {"max_rank": 0},
        {"rank": 3, "energy": 0.5},
        {"energy": float("nan")},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_usage_errors(options) -> None:
    with pytest.raises(UsageError):
        AggregateOptions(**options)


def test_a_client_above_the_largest_rank_is_refused(tmp_path: Path) -> None:
    make_round(tmp_path)

    with pytest.raises(InputError, match="cy: rank 6, above --max-rank 5"):
        aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(max_rank=5))


def test_overflow_of_the_output_dtype_is_an_error_not_an_infinity(tmp_path: Path) -> None:
    make_round(tmp_path, [replace(ROUND[0], alpha=1e12), ROUND[1]])

    with pytest.raises(InputError, match="leave the range of float16; give a wider --dtype"):
        aggregate(
            [tmp_path / "round"],
            tmp_path / "out",
            AggregateOptions(dtype="float16", split="left", rank=2),
        )
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".out*"))


def test_underflow_of_the_output_dtype_is_an_error_not_a_zero(tmp_path: Path) -> None:
    make_round(tmp_path, [replace(ROUND[0], alpha=1e-9), replace(ROUND[1], alpha=2e-9)])

    with pytest.raises(InputError, match="leave the range of float16"):
        aggregate(
            [tmp_path / "round"], tmp_path / "out", AggregateOptions(dtype="float16", split="left")
        )


def test_a_vanishing_piece_is_not_hidden_by_a_large_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for one, side in zip(make_round(tmp_path, ROUND[:2]), "BA", strict=True):
        path = one.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({k: t * (1e-9 if f"lora_{side}" in k else 1) for k, t in tensors.items()}, path)

    options = AggregateOptions(method="flora", dtype="float16")
    with pytest.raises(InputError, match="leave the range of float16"):
        aggregate([tmp_path / "round"], tmp_path / "out", options)


def test_a_rank_that_only_the_previous_adapter_has_may_be_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2, shapes={"q": (9, 9)}))
    previous = make(tmp_path, Spec("old", rank=20, shapes={"q": (9, 9), "other.v": (40, 50)}))

    for rank in (17, 20, 40):
        options = AggregateOptions(rank=rank, previous=previous.folder)
        assert aggregate([tmp_path / "round"], tmp_path / f"out{rank}", options).rank == rank
    with pytest.raises(UsageError, match="no module has more than 40 directions"):
        aggregate([tmp_path / "round"], tmp_path / "out", replace(options, rank=41))
