"""The layout of PEFT 0.19.0, which alone exchanges the sides of the experts of all models."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.adapters import config
from support.experts import (
    PARAMETERS,
    WEIGHTS,
    as_before,
    assert_mean,
    gpt_oss,
    qwen,
    square,
    trained,
)
from support.peft_layers import train
from support.peft_versions import NEWER_EXPERTS

from fedlora_cli import AggregateOptions, InputError, aggregate, read
from fedlora_cli.adapters.expert_layouts import expert_layout

# Recorded by running PEFT 0.19.0 and 0.19.1 under transformers 5.24, for both models at width 24:
# the shapes of A and B of gate_up_proj and of down_proj. The update that PEFT merges into an expert
# was (B A)^T for qwen and B A for gpt_oss with 0.19.0, and the other way round with 0.19.1.
SHAPES = {
    "0.19.0": [(8, 48), (16, 8), (8, 16), (24, 8)],
    "0.19.1": [(8, 16), (48, 8), (8, 24), (16, 8)],
}
MODELS = pytest.mark.parametrize("model", [qwen, gpt_oss])


@NEWER_EXPERTS
@MODELS
@pytest.mark.parametrize("version", ["0.19.0", "0.19.1"])
def test_this_suite_has_the_recorded_shapes(tmp_path: Path, model, version: str) -> None:
    train(model(), tmp_path / "a", 0, r=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
    as_before(tmp_path / "a", version, exchange=version == "0.19.0")

    tensors = load_file(tmp_path / "a" / WEIGHTS)

    layer = "base_model.model.model.layers.0.mlp.experts."
    names = [f"{pair}lora_{side}.weight" for pair in ("base_layer.", "") for side in "AB"]
    assert [tuple(tensors[layer + name].shape) for name in names] == SHAPES[version]


@NEWER_EXPERTS
@MODELS
def test_experts_of_peft_0_19_0_are_turned_where_shapes_tell(tmp_path: Path, model) -> None:
    base = model()
    own = trained(base, tmp_path / "round", "abc")
    as_before(tmp_path / "round/a", "0.19.0")
    as_before(tmp_path / "round/b", "0.19.1", exchange=False)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    assert_mean(base, tmp_path / "out", own)
    assert config(tmp_path / "out")["peft_version"] == "0.19.1"


@NEWER_EXPERTS
@MODELS
def test_three_layouts_take_part_in_a_round(tmp_path: Path, model) -> None:
    """Both older layouts of most models are equal; those of gpt_oss are transposed."""
    base = model()
    own = trained(base, tmp_path / "round", "abc")
    as_before(tmp_path / "round/a", "0.18.1", exchange=model is qwen)
    as_before(tmp_path / "round/b", "0.19.0")

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    assert_mean(base, tmp_path / "out", own)


@NEWER_EXPERTS
@MODELS
def test_clients_of_peft_0_19_0_get_an_adapter_for_it(tmp_path: Path, model) -> None:
    base = model()
    own = trained(base, tmp_path / "round", "ab")
    as_before(tmp_path / "round/a", None, exchange=model is qwen)
    as_before(tmp_path / "round/b", "0.19.0")

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora"))

    assert config(tmp_path / "out")["peft_version"] == "0.19.0"
    assert any("PEFT 0.19.0 stored the experts of the clients" in one for one in report.warnings)
    as_before(tmp_path / "out", "0.19.1")  # the exchange is its own inverse
    assert_mean(base, tmp_path / "out", own)


@NEWER_EXPERTS
@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.19.0", r"0\.19\.0"),
        ("0.19.1.dev0", r"0\.18\.2\.dev0 or 0\.19\.1\.dev0"),
        (None, r"before 0\.19"),
    ],
)
def test_square_experts_of_an_unclear_layout_are_refused(
    tmp_path: Path, version: str | None, words: str
) -> None:
    root = square(tmp_path / "round", "abc")
    as_before(root / "b", version)

    with pytest.raises(InputError, match=rf"PEFT {words} stored its experts, and their shapes do"):
        aggregate([root], tmp_path / "out")

    report = aggregate([root], tmp_path / "out", AggregateOptions(on_bad_client="skip"))
    assert [one.name for one in report.left_out] == ["b"]


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        (None, "before 0.19"),
        ("", "before 0.19"),
        ("0.18", "before 0.19"),
        ("0.18.1", "before 0.19"),
        ("0.18.1.dev0", "before 0.19"),
        ("0.18.2.dev0@5356277d0", "0.18.2.dev0 or 0.19.1.dev0"),
        ("0.19", "0.19.0"),
        ("0.19.0", "0.19.0"),
        ("0.19.1.dev0@5b6e5e993", "0.18.2.dev0 or 0.19.1.dev0"),
        ("0.19.1", "0.19.1 or later"),
        ("0.19.2.dev0", "0.19.1 or later"),
        ("0.20.0", "0.19.1 or later"),
        ("1.0.0", "0.19.1 or later"),
    ],
)
def test_the_layout_follows_from_the_version(version: str | None, layout: str) -> None:
    assert expert_layout(version).versions == layout


def test_a_new_file_is_read_in_the_layout_that_it_was_written_in(tmp_path: Path) -> None:
    trained(qwen(), tmp_path / "round", "ab")
    for version in (None, "0.19.0", "0.19.1.dev0", "0.19.1"):
        for name in "ab":
            as_before(tmp_path / "round" / name, version, exchange=False)
        out = tmp_path / f"out-{version}"
        aggregate([tmp_path / "round"], out)
        assert config(out).get("peft_version") == version
        assert read(out).metadata.expert_layout == expert_layout(version)
