"""Experts in the layouts of PEFT before 0.19.1, beside those of later versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import config
from support.experts import (
    WEIGHTS,
    as_before,
    assert_mean,
    gpt_oss,
    qwen,
    square,
    trained,
)
from support.peft_layers import applied, load
from support.peft_versions import NEWER_EXPERTS

from fedlora_cli import AggregateOptions, InputError, aggregate, distribute


@NEWER_EXPERTS
@pytest.mark.parametrize("version", ["0.18.1", "0.17.0", None])
@pytest.mark.parametrize("width", [24, 16, 8])
def test_older_experts_are_turned_where_shapes_tell(tmp_path: Path, width: int, version) -> None:
    base = qwen(width)
    own = trained(base, tmp_path / "round", "abc")
    as_before(tmp_path / "round/a", version)
    as_before(tmp_path / "round/b", version)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    assert_mean(base, tmp_path / "out", own)
    assert config(tmp_path / "out")["peft_version"] == "0.19.1"


@NEWER_EXPERTS
@pytest.mark.parametrize(("version", "stamp"), [("0.18.1", None), ("0.19.0", "0.19.0")])
def test_each_client_gets_its_own_layout_back(tmp_path: Path, version: str, stamp) -> None:
    base = qwen()
    own = trained(base, tmp_path / "round", "ab")
    as_before(tmp_path / "round/a", version)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora"))

    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    before, after = (load_file(tmp_path / where / "a" / WEIGHTS) for where in ("round", "next"))
    assert {key: one.shape for key, one in before.items()} == {
        key: one.shape for key, one in after.items()
    }
    assert config(tmp_path / "next/a").get("peft_version") == stamp
    assert config(tmp_path / "next/b")["peft_version"] == "0.19.1"
    as_before(tmp_path / "next/a", "0.21.0")  # the exchange is its own inverse
    handed = applied(load(base, tmp_path / "next/a"))
    for key, value in handed.items():
        mean = sum(one[key] for one in own.values()) / 2
        U, s, Vh = torch.linalg.svd(mean, full_matrices=False)
        best = (U[..., :2] * s[..., None, :2]) @ Vh[..., :2, :]
        assert float((value - best).norm() / best.norm()) < 1e-5, key


def test_a_model_of_the_few_is_the_same_in_both_layouts(tmp_path: Path) -> None:
    base = gpt_oss()
    own = trained(base, tmp_path / "round", "ab")
    as_before(tmp_path / "round/a", exchange=False)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    assert_mean(base, tmp_path / "out", own)


@NEWER_EXPERTS
def test_an_older_global_adapter_goes_on_with_newer_clients(tmp_path: Path) -> None:
    """A federation upgrades: round 1 was of PEFT 0.18, round 2 is of 0.21."""
    base = qwen()
    trained(base, tmp_path / "first", "ab")
    newer = tmp_path / "newer"
    aggregate([tmp_path / "first"], newer)
    for name in "ab":
        as_before(tmp_path / "first" / name)
    aggregate([tmp_path / "first"], tmp_path / "older")
    trained(base, tmp_path / "second", "c")

    found = []
    for previous in (newer, tmp_path / "older"):
        options = AggregateOptions(method="residual", previous=previous, verify=True)
        aggregate([tmp_path / "second"], tmp_path / f"{previous.name}-next", options)
        found.append(applied(load(base, tmp_path / f"{previous.name}-next")))

    assert set(found[0]) == set(found[1])
    for key, value in found[0].items():
        assert float((found[1][key] - value).norm() / value.norm()) < 1e-5, key


def test_clients_that_are_all_older_stay_so(tmp_path: Path) -> None:
    trained(qwen(), tmp_path / "round", "ab")
    for name in "ab":
        as_before(tmp_path / "round" / name)

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    assert "peft_version" not in config(tmp_path / "out")
    assert any("PEFT before 0.19 stored the experts" in one for one in report.warnings)


@NEWER_EXPERTS
def test_square_experts_of_two_versions_are_refused_by_that_reason(tmp_path: Path) -> None:
    root = square(tmp_path / "round", "abc")
    as_before(root / "b")

    with pytest.raises(InputError, match=r"PEFT before 0\.19 stored its experts, and their shapes"):
        aggregate([root], tmp_path / "out")

    report = aggregate([root], tmp_path / "out", AggregateOptions(on_bad_client="skip"))
    assert [one.name for one in report.left_out] == ["b"]


@NEWER_EXPERTS
def test_sides_that_are_exchanged_without_a_reason_are_named(tmp_path: Path) -> None:
    """The version says that the layout is the newer one, but the shapes are the older one's."""
    trained(qwen(), tmp_path / "round", "abc")
    as_before(tmp_path / "round/b", "0.21.0")

    with pytest.raises(InputError, match=r"its transpose, as PEFT before 0\.19 stored experts"):
        aggregate([tmp_path / "round"], tmp_path / "out")


def test_a_client_without_experts_says_nothing_about_them(tmp_path: Path) -> None:
    """Its config has the same target_parameters, and a newer version."""
    trained(qwen(16), tmp_path / "round", "abc")
    for name in "ab":
        as_before(tmp_path / "round" / name)
    as_before(tmp_path / "round/c", "0.21.0", exchange=False)
    weights = tmp_path / "round/c" / WEIGHTS
    tensors = {key: one for key, one in load_file(weights).items() if "experts" not in key}
    save_file(tensors, weights, metadata={"format": "pt"})

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    assert "peft_version" not in config(tmp_path / "out")
    assert any("PEFT before 0.19 stored the experts" in one for one in report.warnings)


@NEWER_EXPERTS
def test_one_newer_client_with_exchanged_sides_is_at_fault_itself(tmp_path: Path) -> None:
    base = qwen()
    own = trained(base, tmp_path / "round", "abcd")
    as_before(tmp_path / "round/a")
    as_before(tmp_path / "round/d", "0.21.0")  # it claims the newer layout, and has the older one

    options = AggregateOptions(method="flora", on_bad_client="skip")
    report = aggregate([tmp_path / "round"], tmp_path / "out", options)

    assert [one.name for one in report.left_out] == ["d"]
    assert_mean(base, tmp_path / "out", {name: own[name] for name in "abc"})
