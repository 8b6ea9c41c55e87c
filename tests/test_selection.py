"""Names in written configs: those of the clients where PEFT selects the same by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import Spec, config, make
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from test_peft_layers import applied, load, train
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fedlora_cli import Options, aggregate, distribute
from fedlora_cli.formats.peft.selection import (
    modules_to_save,
    patterns,
    target_modules,
    token_indices,
    with_parents,
)

LAYERS = [f"m.layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
Q = [name for name in LAYERS if name.endswith("q_proj")]


@pytest.mark.parametrize(
    ("written", "offered", "expected"),
    [
        (LAYERS, [("q_proj", "v_proj")], ["q_proj", "v_proj"]),
        (LAYERS, [("q_proj",), ("v_proj",)], ["q_proj", "v_proj"]),  # one client each
        (LAYERS, [("gone", "q_proj", "v_proj")], ["q_proj", "v_proj"]),
        (LAYERS, [("q_proj",), ("q_proj", "v_proj")], ["q_proj", "v_proj"]),
        (Q, [("layers.0.q_proj", "layers.1.q_proj")], ["layers.0.q_proj", "layers.1.q_proj"]),
        (LAYERS, [r".*\.[qv]_proj"], r".*\.[qv]_proj"),
        (Q, [("q_proj", "layers")], ["q_proj"]),
        # What selects more, or less, or is one client's choice for all to run, is not taken.
        (Q, [("v_proj",)], Q),
        (LAYERS[:1], [("q_proj",)], LAYERS[:1]),
        (LAYERS, [r".*\.[qv]_proj", ("q_proj",)], LAYERS),
        (LAYERS, [r"(.*)+\.[qv]_proj!"], LAYERS),
        (LAYERS, [()], LAYERS),
        (["fc"], [()], "fc"),
    ],
)
def test_names_of_clients_are_taken_where_they_select_the_same(written, offered, expected) -> None:
    assert target_modules(written, LAYERS, offered) == (
        sorted(expected) if isinstance(expected, list) else expected
    )


names = st.lists(st.sampled_from("abqv01"), min_size=1, max_size=4).map(".".join)
selections = st.one_of(
    st.lists(names, max_size=4).map(lambda chosen: tuple(sorted(chosen))),
    names.map(lambda name: rf"(.*\.)?{name}"),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sets(names, min_size=1, max_size=6),
    st.sets(names, max_size=4),
    st.lists(selections, max_size=3),
)
def test_what_is_written_selects_exactly_these_modules_in_peft(written, others, offered) -> None:
    """But for a full name that is the ending of another one, which only an expression can tell."""
    chosen = target_modules(written, others, offered)

    own = LoraConfig(target_modules=chosen)
    selected = {name for name in with_parents([*written, *others]) if _selects(own, name)}
    if isinstance(chosen, list) and chosen == sorted(written):
        assert written <= selected
    else:
        assert selected == written


def _selects(own: LoraConfig, name: str) -> bool:
    return bool(check_target_module_exists(own, name))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, st.integers(1, 3), min_size=1, max_size=8))
def test_patterns_give_every_module_its_value_in_peft(values) -> None:
    usual, found = patterns({tuple(name.split(".")): value for name, value in values.items()})

    on_disk = json.loads(json.dumps(found, sort_keys=True))
    for name, value in values.items():
        assert on_disk.get(get_pattern_key(on_disk, name), usual) == value


@pytest.mark.parametrize(
    ("owners", "known", "offered", "expected"),
    [
        (["model.score"], LAYERS, ["classifier", "score"], ["score"]),
        (["model.score"], [*LAYERS, "old_score"], ["score"], ["model.score"]),
        (["model.score"], LAYERS, [], ["model.score"]),
        (["model.score"], LAYERS, ["(s|s)+core"], ["model.score"]),
        (["a.head", "b.head"], LAYERS, ["head"], ["head"]),
        (["a.head"], ["b.head.dense"], ["head"], ["a.head"]),
    ],
)
def test_heads_have_the_clients_names_where_these_select_the_same(
    owners, known, offered, expected
) -> None:
    assert modules_to_save(owners, known, offered) == expected


@pytest.mark.parametrize(
    ("tokens", "offered", "expected"),
    [
        ({"m.embed": [3, 1]}, ["embed"], {"m.embed": [1, 3]}),
        ({"a.embed": [1], "b.embed": [1]}, ["embed"], {"embed": [1]}),
        ({"a.embed": [1], "b.embed": [2]}, ["embed"], {"a.embed": [1], "b.embed": [2]}),
        ({"a.embed": [1], "b.head": [1]}, ["embed", "head"], {"a.embed": [1], "b.head": [1]}),
    ],
)
def test_embeddings_under_one_name_have_one_entry(tokens, offered, expected) -> None:
    assert token_indices(tokens, offered) == expected


def llava() -> nn.Module:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": 100,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
        )
    )


def renamed(folder: Path) -> None:
    """The adapter as transformers before 4.52 named its modules."""
    path = folder / "adapter_model.safetensors"
    now, before = "model.language_model.layers", "language_model.model.layers"
    tensors = {key.replace(now, before): one for key, one in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["up_proj", "down_proj"]},
        {"target_modules": ["mlp.up_proj"]},
        {"target_modules": r".*\.(up_proj|down_proj)"},
        {"target_modules": ["up_proj", "down_proj"], "rank_pattern": {"down_proj": 3}},
    ],
)
def test_old_names_of_modules_load_wherever_the_clients_adapters_do(tmp_path: Path, fields) -> None:
    base = llava()
    own = {}
    for k, name in enumerate("ab"):
        folder = tmp_path / "round" / name
        own[name] = applied(train(base, folder, k, r=2 * (k + 1), lora_alpha=3, **fields))
        renamed(folder)
        assert set(applied(load(base, folder))) == set(own[name])

    aggregate([tmp_path / "round"], tmp_path / "out", Options(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own["a"])
    for key, value in found.items():
        mean = (own["a"][key] + own["b"][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key
    for name in "ab":
        assert set(applied(load(base, tmp_path / "next" / name))) == set(own[name])


def marian() -> nn.Module:
    return MarianMTModel(
        MarianConfig(
            vocab_size=30,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=1,
        )
    )


@pytest.mark.parametrize(
    "tokens", [[5, 2], {"embed_tokens": [5, 2]}, {"shared": [5, 2]}, {"lm_head": [5, 2]}]
)
def test_trained_tokens_of_tied_embeddings_are_loaded(tmp_path: Path, tokens: Any) -> None:
    base = marian()
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": tokens}
    own = [
        applied(train(base, tmp_path / "round" / name, k, r=2, **fields))
        for k, name in enumerate("ab")
    ]

    aggregate([tmp_path / "round"], tmp_path / "out", Options(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own[0])
    assert set(applied(load(base, tmp_path / "next/a"))) == set(own[0])
    for key, value in found.items():
        mean = (own[0][key] + own[1][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOE: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("build", ["qwen3", "qwen2"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": SEVEN},
        {"target_modules": "all-linear"},
        {"target_modules": SEVEN, "rank_pattern": {"q_proj": 3}},
        {"target_modules": SEVEN, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 7}},
        {"target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj)"},
        {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "gate.weight"]},
    ],
)
def test_what_peft_makes_of_the_targets_of_a_mixture(tmp_path: Path, build: str, fields) -> None:
    """PEFT rewrites names of experts to parameters without their modules."""
    base: nn.Module
    if build == "qwen3":
        base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, head_dim=8))
    else:
        base = Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=24))
    own = {}
    for k, name in enumerate("ab"):
        ranks = fields.get("rank_pattern", {})
        alike = {"rank_pattern": {one: rank + k for one, rank in ranks.items()}} if ranks else {}
        arguments = fields | alike
        folder = tmp_path / "round" / name
        own[name] = applied(train(base, folder, k, r=2 * (k + 1), lora_alpha=3, **arguments))

    aggregate([tmp_path / "round"], tmp_path / "out", Options(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own["a"])
    for key, value in found.items():
        mean = (own["a"][key] + own["b"][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key
    for name in "ab":
        assert set(applied(load(base, tmp_path / "next" / name))) == set(own[name])


def test_configs_of_large_models_stay_small(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.self_attn.q_proj": (3, 4) for i in range(200)}
    own = {"target_modules": ["q_proj"]}
    for k, name in enumerate("ab"):
        make(tmp_path / "round", Spec(name, rank=k + 1, shapes=shapes, config=own))

    aggregate([tmp_path / "round"], tmp_path / "out")

    assert config(tmp_path / "out")["target_modules"] == ["q_proj"]
    assert (tmp_path / "out/adapter_config.json").stat().st_size < 1000
