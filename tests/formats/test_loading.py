"""The check that PEFT loads all of a written adapter, held against what PEFT itself loads."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from support.adapters import Spec, config, make
from support.peft_versions import NEWER_EXPERTS

from fedlora_cli import AggregateOptions, aggregate
from fedlora_cli.adapters.adapter import Selection
from fedlora_cli.errors import InputError, VerificationError
from fedlora_cli.formats.peft import new_config
from fedlora_cli.formats.peft.loading import check_loading

PREFIX = "base_model.model."
OUT, IN = 3, 4


class Embedded(torch.nn.Module):
    """A tree of linear layers with these names; `embed` is an embedding."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            *outer, last = name.split(".")
            place: torch.nn.Module = self
            for part in outer:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            leaf = torch.nn.Embedding(5, 4) if last == "embed" else torch.nn.Linear(IN, OUT)
            place.add_module(last, leaf)


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def loads(names: list[str], fields: dict[str, Any], state: dict[str, torch.Tensor]) -> bool:
    """Whether PEFT takes all of these tensors into a model of these modules, and misses none."""
    model = Embedded(names)
    try:
        wrapped = peft.get_peft_model(model, LoraConfig(**fields))
        # Some versions of PEFT change the names in the mapping.
        result = set_peft_model_state_dict(wrapped, dict(state))
    except (KeyError, ValueError, RuntimeError):
        return False
    own = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    return not result.unexpected_keys and own <= set(state)


def passes(fields: dict[str, Any], state: dict[str, torch.Tensor]) -> bool:
    try:
        check_loading(fields, shapes_of(state))
    except InputError:
        return False
    return True


def pair(module: str, rank: int) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.zeros(rank, IN),
        f"{PREFIX}{module}.lora_B.weight": torch.zeros(OUT, rank),
    }


parts = st.sampled_from(["a", "b", "q", "0", "1"])
module_names = st.lists(
    st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, max_size=5, unique=True
)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[list[str], dict[str, Any], dict[str, torch.Tensor]]:
    """Modules, a config for them that may or may not fit, and the tensors of each module."""
    names = draw(module_names)
    # A module that lies in another linear layer is no module of a model.
    names = [n for n in names if not any(o != n and o.startswith(f"{n}.") for o in names)]
    entries = [n.split(".", k)[-1] for n in names for k in range(n.count(".") + 1)]
    some = st.lists(st.sampled_from(sorted({*entries, "a", "q"})), min_size=1, unique=True)
    expression = some.map(lambda chosen: rf"(.*\.)?({'|'.join(map(re.escape, chosen))})")
    target: Any = draw(st.one_of(some, expression, st.just(names)))
    ranks = draw(st.dictionaries(st.sampled_from(sorted(entries)), st.integers(1, 2), max_size=2))
    pattern = {re.escape(name): rank for name, rank in sorted(ranks.items())}
    saved = draw(st.one_of(st.none(), some))
    fields = {"r": 2, "target_modules": target, "rank_pattern": pattern, "modules_to_save": saved}
    fields["exclude_modules"] = draw(st.one_of(st.none(), some, expression))
    if isinstance(target, list):
        fields["layers_to_transform"] = draw(st.sampled_from([None, None, [0], [0, 1]]))
    if fields.get("layers_to_transform"):
        fields["layers_pattern"] = draw(st.sampled_from([None, ["a"], ["b", "a"]]))
    state: dict[str, torch.Tensor] = {}
    for name in names:
        kind = draw(st.sampled_from(["factors", "factors", "factors", "saved"]))
        if kind == "saved":
            state[f"{PREFIX}{name}.weight"] = torch.zeros(OUT, IN)
            state[f"{PREFIX}{name}.bias"] = torch.zeros(OUT)
        else:
            state |= pair(name, draw(st.sampled_from([2, 2, 1])))
    return names, fields, state


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(adapters())
def test_the_check_says_what_peft_does(case) -> None:
    names, fields, state = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = loads(names, fields, state)
    # A tensor of the base model under its own name is loaded whether it is to be saved or not.
    plain = [key for key in state if "lora_" not in key]
    if plain and not fields["modules_to_save"]:
        return
    assert passes(fields, state) == taken


EMBEDDING = {f"{PREFIX}m.embed.token_adapter.trainable_tokens_delta": torch.zeros(2, 4)}
FACTORED = {
    f"{PREFIX}m.embed.lora_embedding_A": torch.zeros(2, 5),
    f"{PREFIX}m.embed.lora_embedding_B": torch.zeros(4, 2),
}
DORA = {f"{PREFIX}m.q.lora_magnitude_vector": torch.zeros(OUT)}
BIAS = {f"{PREFIX}m.q.lora_B.bias": torch.zeros(OUT)}
Q = pair("m.q", 2)


@pytest.mark.parametrize(
    ("fields", "state", "taken"),
    [
        ({}, Q, True),
        ({"rank_pattern": {r"m\.q": 3}}, Q, False),
        ({"rank_pattern": {"^q": 3}}, Q, True),
        ({"rank_pattern": {"^m.q": 3}}, Q, False),
        ({"trainable_token_indices": {"embed": [1, 3]}}, Q | EMBEDDING, True),
        ({"trainable_token_indices": {"m.embed": [1, 3]}}, Q | EMBEDDING, True),
        ({"trainable_token_indices": {"embed": [1, 3, 4]}}, Q | EMBEDDING, False),
        ({}, Q | EMBEDDING, False),
        ({"target_modules": ["q", "embed"]}, Q | FACTORED, True),
        ({}, Q | FACTORED, False),
        ({"use_dora": True}, Q | DORA, True),
        ({}, Q | DORA, False),
        ({"use_dora": True}, Q, False),
        ({}, {key: one for key, one in Q.items() if "lora_B" in key}, False),
        ({}, {key: one for key, one in Q.items() if "lora_A" in key}, False),
        ({"lora_bias": True}, Q | BIAS, True),
        ({"lora_bias": True}, Q, False),
        ({}, Q | BIAS, False),
        ({}, Q | {f"{PREFIX}m.q.base_layer.bias": torch.zeros(OUT)}, True),
        ({}, Q | {f"{PREFIX}m.q.bias": torch.zeros(OUT)}, False),
        ({}, Q | {f"{PREFIX}m.embed.weight": torch.zeros(5, 4)}, True),
        ({}, Q | {f"{PREFIX}m.embed.base_layer.weight": torch.zeros(5, 4)}, False),
        (
            {"target_modules": ["q", "embed"]},
            Q | FACTORED | {f"{PREFIX}m.embed.base_layer.weight": torch.zeros(5, 4)},
            True,
        ),
        (
            {"trainable_token_indices": {"embed": [1, 3]}},
            Q | EMBEDDING | {f"{PREFIX}m.embed.token_adapter.base_layer.weight": torch.zeros(5, 4)},
            True,
        ),
        ({"modules_to_save": ["o"]}, Q | {f"{PREFIX}m.o.weight": torch.zeros(OUT, IN)}, True),
    ],
)
def test_tensors_of_every_kind_have_a_place(fields, state, taken: bool) -> None:
    fields = {"r": 2, "target_modules": ["q"]} | fields
    names = ["m.q"] + ["m.embed"] * any("embed" in key for key in state)
    names += ["m.o"] * any(".o." in key for key in state)
    if "modules_to_save" in fields:
        state = state | {f"{PREFIX}m.o.bias": torch.zeros(OUT)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert loads(names, fields, state) == taken
    assert passes(fields, state) == taken


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Parameter(torch.zeros(3, OUT, IN))
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(3, OUT, IN))


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.q = Experts(), torch.nn.Linear(IN, OUT)


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        pytest.param(
            {"target_modules": ["q"], "target_parameters": ["down_proj", "gate_up_proj"]},
            True,
            marks=NEWER_EXPERTS,
        ),
        ({"target_modules": ["q"], "target_parameters": ["experts.down_proj"]}, False),
        ({"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]}, False),
        ({"target_modules": ["q"]}, False),
        (
            {
                "target_modules": ["q"],
                "target_parameters": ["down_proj", "gate_up_proj"],
                "rank_pattern": {"gate_up_proj": 4, "down_proj": 4},
            },
            False,
        ),
        # One pair would hold three experts, the other six.
        (
            {
                "target_modules": ["q"],
                "target_parameters": ["down_proj", "gate_up_proj"],
                "rank_pattern": {"gate_up_proj": 1},
            },
            False,
        ),
    ],
)
def test_experts_need_their_parameters_and_attention_its_modules(fields, taken: bool) -> None:
    """The config with `target_modules: []` is what fedlora 0.1 wrote for a mixture of experts."""
    state = pair("q", 2)
    for name in ("experts", "experts.base_layer"):
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.zeros(6, IN)
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(OUT, 6)
    fields = {"r": 2} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LoraModel(Mixture(), {"default": LoraConfig(**fields)}, "default")
    made = {
        name.replace("model.", PREFIX, 1).replace(".default", ""): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert (made == shapes_of(state)) == taken
    assert passes(fields, state) == taken


def test_a_config_that_peft_would_not_load_is_never_written(tmp_path: Path, monkeypatch) -> None:
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2))
    really = new_config.selection

    def less(*names: Any) -> Selection:
        chosen = really(*names)
        return replace(chosen, modules=chosen.modules[1:])

    monkeypatch.setattr(new_config, "selection", less)

    with pytest.raises(InputError, match=r"PEFT would not load layers\.0\.q_proj: nei"):
        aggregate([tmp_path / "round"], tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_verify_reads_the_written_config_as_peft_does(tmp_path: Path, monkeypatch) -> None:
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2))
    from fedlora_cli.rounds import aggregate as workflow

    really = workflow.verify

    def damaged(plan, folder: Path, *rest):
        fields = config(folder) | {"target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return really(plan, folder, *rest)

    monkeypatch.setattr(workflow, "verify", damaged)
    with pytest.raises(VerificationError, match=r"PEFT would not load layers\.0\.v_proj"):
        aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))
    assert not (tmp_path / "out").exists()
