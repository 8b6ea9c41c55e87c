"""Architectures times the forms of config that PEFT saves: what PEFT applies is the judge.

A client's adapter is trained (filled with noise) and saved by PEFT, aggregated, handed out again,
and loaded by PEFT. It must apply the float64 mean of what it applied for the clients, to the same
modules.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.architectures import ARCHITECTURES, Architecture
from support.peft_layers import train
from torch import Tensor, nn

from fedlora_cli import AggregateOptions, InitOptions, aggregate, distribute, initialize

pytestmark = pytest.mark.long

WEIGHTS = "adapter_model.safetensors"

#: The seven projections of a decoder: PEFT turns those of fused experts into parameters.
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _embedding(model: nn.Module) -> str | None:
    """The last part of the name of the input embedding, if the model has one of words."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(found, nn.Embedding):
        return None
    return next(name for name, one in model.named_modules() if one is found).rpartition(".")[2]


Fields = dict[str, Any]
Form = Callable[[Architecture, nn.Module], Fields | None]

#: Fields of a LoraConfig by form; None where the form has no meaning for the architecture.
FORMS: dict[str, Form] = {
    "names": lambda one, model: {},
    "all linear": lambda one, model: {"target_modules": "all-linear"},
    "expression": lambda one, model: {"target_modules": rf".*\.({'|'.join(one.targets)})"},
    "patterns": lambda one, model: {
        "rank_pattern": {one.targets[0]: 4},
        "alpha_pattern": {one.targets[0]: 7},
        "use_rslora": True,
    },
    "one layer": lambda one, model: {"layers_to_transform": [0]},
    "excluded": lambda one, model: {"exclude_modules": r".*\.0\..*"},
    "all biases": lambda one, model: {"bias": "all"},
    "bias on lora_B": lambda one, model: {"lora_bias": True},
    "heads": lambda one, model: {"modules_to_save": list(one.heads)} if one.heads else None,
    "tokens": lambda one, model: (
        {"trainable_token_indices": [5, 2, 9]} if _embedding(model) else None
    ),
    "tokens by name": lambda one, model: (
        {"trainable_token_indices": {_embedding(model): [5, 2]}} if _embedding(model) else None
    ),
    "embedding": lambda one, model: (
        {"target_modules": [*one.targets, _embedding(model)]} if _embedding(model) else None
    ),
    "seven": lambda one, model: (
        {"target_modules": SEVEN} if "expert" in str(one.sizes | one.more) else None
    ),
}

#: What PEFT itself refuses: layers that Mamba does not call, an embedding that it looks for and
#: that is not there, and exclusions that leave nothing.
REFUSED = {("mamba", "all linear"), ("wav2vec2", "all linear")} | {
    (name, "excluded")
    for name, one in ARCHITECTURES.items()
    if name in ("albert", "whisper") or "encoder_layers" in one.sizes or "d_kv" in one.sizes
}

#: Forms that do not depend on the architecture much: half of them are enough.
EVERY_OTHER = ("expression", "one layer", "excluded", "bias on lora_B", "tokens by name")

TRIALS = [
    (name, form)
    for number, name in enumerate(ARCHITECTURES)
    for form in FORMS
    if form not in EVERY_OTHER or (number + EVERY_OTHER.index(form)) % 2
]


def effects(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter adds to a model or puts into it, by PEFT's own computation, in float64."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            if "default" not in {**module.lora_A, **module.lora_embedding_A}:
                continue
            found[name] = module.get_delta_weight("default").detach().double()
            if "default" in module.lora_B and module.lora_B["default"].bias is not None:
                bias = module.lora_B["default"].bias.detach().double()
                found[f"{name} bias"] = module.scaling["default"] * bias
        if hasattr(module, "trainable_tokens_delta"):
            rows = module.trainable_tokens_delta["default"].detach().double()
            pairs = zip(module.token_indices["default"], rows, strict=True)
            found |= {f"{name} token {index}": row for index, row in pairs}
    for name, parameter in model.named_parameters():
        if "lora_" not in name and (".modules_to_save." in name or name.endswith(".bias")):
            found[name] = parameter.detach().double()
    return found


def loaded(base: nn.Module, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """What PEFT applies of an adapter, and the beginnings of all that it warns of in loading it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return effects(model), {str(one.message)[:40] for one in said}


@pytest.mark.parametrize(("name", "form"), TRIALS)
def test_peft_applies_the_mean(tmp_path: Path, name: str, form: str) -> None:
    """And warns of nothing but what it warns of for a client's own adapter."""
    one = ARCHITECTURES[name]
    base = one.build()
    fields = FORMS[form](one, base)
    if fields is None:
        pytest.skip("the architecture has no such thing")
    fields = {
        "target_modules": list(one.targets),
        "fan_in_fan_out": one.config == "GPT2Config",
    } | fields
    own = []
    for k, client in enumerate("ab"):
        arguments: Fields = {"r": 2 + k, "lora_alpha": 3 + k} | fields
        try:
            own.append(effects(train(base, tmp_path / "round" / client, k, **arguments)))
        except (ValueError, NotImplementedError) as error:
            if (name, form) not in REFUSED:
                raise
            pytest.skip(f"PEFT refuses it: {error}")
    _, usual = loaded(base, tmp_path / "round/a")

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found, said = loaded(base, tmp_path / "out")
    assert (set(found), said - usual) == (set(own[0]), set())
    for key, value in found.items():
        mean = (own[0][key] + own[1][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key
    handed, said = loaded(base, tmp_path / "next/b")
    assert (set(handed), said - usual) == (set(own[1]), set())


@pytest.mark.parametrize("targets", ["names", "all-linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_start_is_what_peft_makes_of_the_model(tmp_path: Path, name: str, targets: str) -> None:
    one = ARCHITECTURES[name]
    base = one.build()
    base.config.save_pretrained(tmp_path / "base")
    chosen = targets if targets == "all-linear" else one.targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            get_peft_model(
                copy.deepcopy(base),
                LoraConfig(r=2, target_modules=chosen if targets == "all-linear" else list(chosen)),
            ).save_pretrained(tmp_path / "own")
        except (ValueError, NotImplementedError) as error:
            if (name, "all linear") not in REFUSED:
                raise
            pytest.skip(f"PEFT refuses it: {error}")

    initialize(
        tmp_path / "base",
        tmp_path / "start",
        options=InitOptions(ranks=(2,), target_modules=chosen),
    )

    expected, usual = loaded(base, tmp_path / "own")
    found, said = loaded(base, tmp_path / "start/rank-2")
    assert (set(found), said - usual) == (set(expected), set())
    shapes = {key: one.shape for key, one in load_file(tmp_path / "own" / WEIGHTS).items()}
    start = load_file(tmp_path / "start/rank-2" / WEIGHTS)
    assert {key: one.shape for key, one in start.items()} == shapes
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
