"""Rare tensors of PEFT over a whole round, and configs that ask for more than there can be."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import CONFIG, PREFIX, WEIGHTS, Spec, make
from support.peft_layers import applied, llama, load, mixtral, train
from torch import nn

from fedlora_cli import (
    AggregateOptions,
    DistributeOptions,
    InputError,
    InspectOptions,
    UsageError,
    aggregate,
    compare,
    diagnose,
    distribute,
    inspect,
    read,
)
from fedlora_cli.adapters.adapter import read_modules

Q = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize("to", [DistributeOptions(), DistributeOptions(ranks=(4,), alpha=32)])
def test_a_bias_on_lora_B_is_handed_out_at_the_scaling_of_whom_it_is_for(
    tmp_path: Path, to: DistributeOptions
) -> None:
    base = llama()
    train(base, tmp_path / "round/one", 0, r=2, lora_alpha=2, lora_bias=True, **Q)
    train(base, tmp_path / "round/two", 1, r=4, lora_alpha=16, lora_bias=True, **Q)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora"))

    distribute(tmp_path / "out", tmp_path / "next", () if to.ranks else tmp_path / "round", to)

    whole = applied(load(base, tmp_path / "out"))
    for folder in (tmp_path / "next").iterdir():
        handed = applied(load(base, folder))
        for key in (key for key in whole if key.endswith("q_proj bias")):
            torch.testing.assert_close(handed[key], whole[key], rtol=1e-6, atol=1e-8)


def test_a_bias_on_lora_B_that_only_the_previous_adapter_has_stays_what_it_was(
    tmp_path: Path,
) -> None:
    base = llama()
    both = {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}
    train(base, tmp_path / "before/one", 0, r=2, lora_alpha=16, **both)
    aggregate([tmp_path / "before"], tmp_path / "first")
    train(base, tmp_path / "round/one", 1, r=3, lora_alpha=3, lora_bias=True, **Q)

    options = AggregateOptions(previous=tmp_path / "first", verify=True)
    aggregate([tmp_path / "round"], tmp_path / "second", options)

    before, after = (applied(load(base, tmp_path / name)) for name in ("first", "second"))
    for key in (key for key in before if "k_proj" in key):
        torch.testing.assert_close(after[key], before[key], rtol=1e-5, atol=1e-7)


def test_heads_in_the_state_of_a_whole_model_are_read_as_peft_saves_them(tmp_path: Path) -> None:
    """With the name of the adapter, and beside the original that was not trained."""
    base = llama()
    config = {"r": 2, "modules_to_save": ["model.norm"], **Q}
    model = train(base, tmp_path / "round/one", 0, **config)
    plain = load_file(tmp_path / "round/one" / WEIGHTS)
    state = {
        f"module.{key}": tensor.contiguous().clone()
        for key, tensor in model.state_dict().items()
        if "lora_" in key or "model.norm." in key
    }
    assert any("original_module" in key for key in state)
    save_file(state, tmp_path / "round/one" / WEIGHTS)

    aggregate([tmp_path / "round"], tmp_path / "out")

    written = load_file(tmp_path / "out" / WEIGHTS)
    assert set(written) == set(plain)
    assert torch.equal(written[f"{PREFIX}model.norm.weight"], plain[f"{PREFIX}model.norm.weight"])
    load(base, tmp_path / "out")


class Wrap(nn.Module):
    """A model whose own names look like PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"q_proj": nn.Linear(6, 4)})})


def test_names_of_a_model_that_look_like_wrappers_stay(tmp_path: Path) -> None:
    train(Wrap(), tmp_path / "round/one", 0, r=2, **Q)

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    assert [row.name for row in report.modules] == ["base_model.model.q_proj"]
    assert not any("tensor names" in warning for warning in report.warnings)


def test_base_weights_of_one_client_do_not_replace_the_base_model(tmp_path: Path) -> None:
    own = {"model.embed_tokens.weight": torch.full((5, 4), 7.0)}
    for k in range(4):
        make(tmp_path / "round", Spec(f"client-{k}", rank=2, tensors=own if k == 0 else {}))

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))

    assert report.tensors == ()
    assert f"{PREFIX}model.embed_tokens.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert any("base weights that few clients send" in warning for warning in report.warnings)


def test_base_weights_of_the_previous_adapter_stay_where_one_client_sends_others(
    tmp_path: Path,
) -> None:
    name = "model.embed_tokens.weight"
    make(tmp_path, Spec("last", rank=2, samples=None, tensors={name: torch.full((5, 4), 3.0)}))
    evil = {name: torch.full((5, 4), 7.0)}
    for k in range(4):
        make(tmp_path / "round", Spec(f"client-{k}", rank=2, tensors=evil if k == 0 else {}))

    options = AggregateOptions(previous=tmp_path / "last", verify=True)
    report = aggregate([tmp_path / "round"], tmp_path / "out", options)

    assert any("base weights that few clients send" in warning for warning in report.warnings)
    assert not any("no other client has it" in warning for warning in report.warnings)
    assert (load_file(tmp_path / "out" / WEIGHTS)[PREFIX + name] == 3.0).all()


def test_a_head_of_one_client_alone_is_said(tmp_path: Path) -> None:
    more: dict[str, Any] = {"config": {"modules_to_save": ["score"]}}
    for k in range(3):
        tensors = {"score.weight": torch.ones(3, 4)} if k == 1 else {}
        make(tmp_path / "round", Spec(f"client-{k}", rank=2, tensors=tensors, **more))

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    assert "score.weight from client-1 alone: no other client has it" in report.warnings


@pytest.mark.parametrize(
    ("count", "found"),
    [(12, "12 parameters of e in target_parameters; name at most 4"), (4, None)],
)
def test_a_config_cannot_ask_for_all_orders_of_many_parameters(
    tmp_path: Path, count: int, found: str | None
) -> None:
    names = ["e" + ".base_layer" * depth for depth in range(count)]
    tensors = {f"{PREFIX}{name}.lora_A.weight": torch.ones(2, 3) for name in names}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": torch.ones(4, 2) for name in names}
    folder = tmp_path / "one"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "target_parameters": [f"e.p{i}" for i in range(count)]}
    (folder / CONFIG).write_text(json.dumps(config))

    # Not all orders are tried: those of twelve would take forty minutes.
    if found is None:
        assert len(read(folder).modules) == count
    else:
        with pytest.raises(InputError, match=found):
            read(folder)


def test_there_are_not_more_experts_than_any_model_has(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}e.lora_A.weight": torch.ones(5000, 1)}
    tensors |= {f"{PREFIX}e.lora_B.weight": torch.ones(1, 5000)}
    folder = tmp_path / "one"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 1, "target_parameters": ["e.p"]}
    (folder / CONFIG).write_text(json.dumps(config))

    with pytest.raises(InputError, match="more than 2048 experts of e"):
        read(folder)


def test_every_tensor_of_experts_is_read_once(
    tmp_path: Path, reads: list[tuple[Path, str]]
) -> None:
    """Also the B that all experts share, whoever asks for all of them."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    train(mixtral(), tmp_path / "one", 0, r=2, target_modules=[], target_parameters=parameters)
    adapter = read(tmp_path / "one")
    assert not reads

    found = read_modules(adapter, adapter.modules)
    assert len(found) == 12
    assert len(reads) == len(set(reads))
    assert sum("lora_B" in key for _, key in reads) == 4
    for name, factors in found.items():
        alone = adapter.modules[name].read()
        assert torch.equal(alone.B, factors.B)
        assert torch.equal(alone.A, factors.A)
    for look in (partial(inspect, options=InspectOptions(values=True)), diagnose, compare):
        reads.clear()
        look([tmp_path / "one"])
        assert sum("lora_B" in key for _, key in reads) == 4
    reads.clear()
    aggregate([tmp_path / "one"], tmp_path / "out", AggregateOptions(clip_norm="auto"))
    assert sum("lora_B" in key for _, key in reads) == 2 * 4  # for the norms, and for the sum


@pytest.mark.parametrize(
    "choice",
    [
        {"robust": "median"},
        {"missing": "xx"},
        {"on_bad_client": "skp"},
        {"basis": "foo"},
        {"dora": "yes"},
        {"split": "up"},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_words_that_are_no_choice_are_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is out of range; it must be one of"):
        AggregateOptions(**choice)
