"""Names in written configs: those of the clients where PEFT selects the same by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from support.adapters import Spec, config, make
from support.architectures import ARCHITECTURES
from support.peft_layers import applied, load, train
from support.peft_versions import needs_peft
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fedlora_cli import AggregateOptions, InputError, aggregate, distribute
from fedlora_cli.adapters.adapter import Selection
from fedlora_cli.formats.peft.selection import (
    modules_to_save,
    patterns,
    selection,
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
    chosen = selection(written, LAYERS, [Selection(one) for one in offered])

    assert chosen == Selection(tuple(sorted(expected)) if isinstance(expected, list) else expected)


def test_the_layers_of_many_clients_are_written_together() -> None:
    """Each client adapts a layer of its own, and there are more clients than selections to try."""
    written = [f"m.layers.{i}.q_proj" for i in range(50)]
    offered = [Selection(("q_proj",), layers=(i,)) for i in range(50)]

    chosen = selection(written, [*written, "m.layers.50.q_proj"], offered)

    assert chosen == Selection(("q_proj",), layers=tuple(range(50)))


names = st.lists(st.sampled_from("abqv01"), min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        ([Selection(("q_proj",), (), (0, 1, 77))], Selection(("q_proj",), (), (0, 1))),
        (
            [Selection(("q_proj",), (), (0,)), Selection(("q_proj",), (), (1,))],
            Selection(("q_proj",), (), (0, 1)),
        ),
        (
            [Selection(("q_proj", "v_proj"), ("v_proj",))],
            Selection(("q_proj",), ("v_proj",)),
        ),
        # Layers that are not written, and an expression of one client of two.
        ([Selection(("q_proj",), (), (77,))], Selection(tuple(Q))),
        ([Selection(("q_proj",), ".*v.*"), Selection(("v_proj",))], Selection(tuple(Q))),
        ([Selection(("q_proj",), (), (0, 1), ("l+",)), Selection()], Selection(tuple(Q))),
    ],
)
def test_layers_and_exclusions_are_taken_where_they_select_the_same(offered, expected) -> None:
    assert selection(Q, LAYERS, offered) == expected


named = st.one_of(
    st.lists(names, max_size=4).map(lambda chosen: tuple(sorted(chosen))),
    names.map(lambda name: rf"(.*\.)?{name}"),
)
layers = st.tuples(
    st.sampled_from([(0,), (1,), (0, 1)]), st.sampled_from([(), ("a",), ("a", "b"), ("a|b",)])
)
selections = st.builds(
    lambda modules, exclude, layers: Selection(
        modules, exclude, *(((), ()) if isinstance(modules, str) else layers)
    ),
    named,
    st.one_of(st.just(()), named),
    st.one_of(st.just(((), ())), layers),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sets(names, min_size=1, max_size=6),
    st.sets(names, max_size=4),
    st.lists(selections, max_size=3),
)
def test_what_is_written_selects_exactly_these_modules_in_peft(written, others, offered) -> None:
    """But for a full name that is the ending of another one, which only an expression can tell."""
    chosen = selection(written, others, offered)

    own = LoraConfig(
        target_modules=_listed(chosen.modules),
        exclude_modules=_listed(chosen.exclude),
        layers_to_transform=list(chosen.layers) or None,
        layers_pattern=list(chosen.layers_pattern) or None,
    )
    selected = {name for name in with_parents([*written, *others]) if _selects(own, name)}
    if chosen == Selection(tuple(sorted(written))):
        assert written <= selected
    else:
        assert selected == written


def _listed(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


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
        # A client must not choose what ends so in the base model, of which not all names are known.
        (["model.score"], LAYERS, ["e", "score"], ["score"]),
        (["model.score"], LAYERS, ["model.score", "score"], ["model.score"]),
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
        ({"m.embed": [3, 1]}, [], {"m.embed": [1, 3]}),
        ({"m.embed": [3, 1]}, ["embed"], {"embed": [1, 3]}),
        ({"m.embed": [3, 1]}, ["bed"], {"m.embed": [1, 3]}),
        ({"a.embed": [1], "b.embed": [1]}, ["embed"], {"embed": [1]}),
        ({"a.embed": [1], "b.embed": [2]}, ["embed"], {"a.embed": [1], "b.embed": [2]}),
        ({"m.a.embed": [1], "m.b.embed": [1]}, ["a.embed"], {"a.embed": [1], "m.b.embed": [1]}),
        ({"a.embed": [1], "b.head": [1]}, ["embed", "head"], {"embed": [1], "head": [1]}),
    ],
)
def test_embeddings_under_one_name_have_one_entry(tokens, offered, expected) -> None:
    assert token_indices(tokens, LAYERS, offered) == expected


def test_a_name_of_tokens_that_selects_another_module_is_not_taken() -> None:
    assert token_indices({"m.embed": [1]}, ["v.embed"], ["embed"]) == {"m.embed": [1]}


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


OLD_NAMES = needs_peft("0.19", "do not load tensors under the old names of modules")


def renamed(folder: Path) -> None:
    """The adapter as transformers before 4.52 named its modules."""
    path = folder / "adapter_model.safetensors"
    now, before = "model.language_model.layers", "language_model.model.layers"
    tensors = {key.replace(now, before): one for key, one in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@OLD_NAMES
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["up_proj", "down_proj"]},
        {"target_modules": ["mlp.up_proj"]},
        {"target_modules": r".*\.(up_proj|down_proj)"},
        {"target_modules": ["up_proj", "down_proj"], "rank_pattern": {"down_proj": 3}},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ".*vision_tower.*"},
        {"target_modules": ["up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]},
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [0],
            "layers_pattern": ["layers"],
        },
    ],
)
def test_old_names_of_modules_load_wherever_the_clients_adapters_do(tmp_path: Path, fields) -> None:
    base = llava()
    own: dict[str, Any] = {}
    for k, name in enumerate("ab"):
        folder = tmp_path / "round" / name
        own[name] = applied(train(base, folder, k, r=2 * (k + 1), lora_alpha=3, **fields))
        renamed(folder)
        assert set(applied(load(base, folder))) == set(own[name])

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own["a"])
    for key, value in found.items():
        mean = (own["a"][key] + own["b"][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key
    for name in "ab":
        assert set(applied(load(base, tmp_path / "next" / name))) == set(own[name])


@OLD_NAMES
def test_layers_of_several_clients_are_all_loaded(tmp_path: Path) -> None:
    """The clients adapt other layers each, of a model whose modules have old names in the file."""
    base = llava()
    own: dict[str, Any] = {}
    for k, name in enumerate("ab"):
        folder = tmp_path / "round" / name
        fields = {"target_modules": ["up_proj"], "layers_to_transform": [k]}
        own |= applied(train(base, folder, k, r=2 * (k + 1), **fields))
        renamed(folder)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own)
    for key, value in found.items():
        assert float((value - own[key]).norm()) <= 1e-5 * float(own[key].norm()), key


@pytest.mark.parametrize("name", ["marian", "bart", "m2m100"])
@pytest.mark.parametrize(
    "tokens",
    [
        [5, 2],
        {"embed_tokens": [5, 2]},
        {"shared": [5, 2]},
        {"lm_head": [5, 2]},
        # By their full names, PEFT takes these for tied and passes over both.
        {"encoder.embed_tokens": [5], "decoder.embed_tokens": [5]},
    ],
)
def test_trained_tokens_of_tied_embeddings_are_loaded(
    tmp_path: Path, name: str, tokens: Any
) -> None:
    base = ARCHITECTURES[name].build()
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": tokens}
    own = [
        applied(train(base, tmp_path / "round" / name, k, r=2, **fields))
        for k, name in enumerate("ab")
    ]

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own[0])
    assert set(applied(load(base, tmp_path / "next/a"))) == set(own[0])
    for key, value in found.items():
        mean = (own[0][key] + own[1][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPLICIT = ["experts.down_proj", "experts.gate_up_proj"]
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
    own: dict[str, Any] = {}
    for k, name in enumerate("ab"):
        ranks = fields.get("rank_pattern", {})
        alike = {"rank_pattern": {one: rank + k for one, rank in ranks.items()}} if ranks else {}
        arguments = fields | alike
        folder = tmp_path / "round" / name
        own[name] = applied(train(base, folder, k, r=2 * (k + 1), lora_alpha=3, **arguments))

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))
    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round")

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set(own["a"])
    for key, value in found.items():
        mean = (own["a"][key] + own["b"][key]) / 2
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key
    for name in "ab":
        assert set(applied(load(base, tmp_path / "next" / name))) == set(own[name])


def test_parameters_may_be_spelled_in_several_ways(tmp_path: Path) -> None:
    """And some clients may adapt no experts, or the router besides."""
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, head_dim=8))
    spellings: list[dict[str, Any]] = [
        {"target_modules": SEVEN},
        {"target_modules": SEVEN[:4], "target_parameters": EXPLICIT},
        {"target_modules": "all-linear"},
        {"target_modules": SEVEN[:4]},
    ]
    own = [
        applied(train(base, tmp_path / "round" / str(k), k, r=2, lora_alpha=3, **fields))
        for k, fields in enumerate(spellings)
    ]

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    found = applied(load(base, tmp_path / "out"))
    assert set(found) == set().union(*own)
    for key, value in found.items():
        held = [one[key] for one in own if key in one]
        mean = sum(held) / len(held)
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key


def test_other_parameters_around_a_module_are_refused(tmp_path: Path) -> None:
    """The pair of the one is named as the outer pair of the two."""
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(MOE | {"moe_intermediate_size": 16}), head_dim=8))
    for name, parameters in (("a", EXPLICIT), ("b", EXPLICIT), ("c", EXPLICIT[:1])):
        fields = {"target_modules": ["q_proj"], "target_parameters": parameters}
        train(base, tmp_path / "round" / name, 1, r=2, **fields)

    with pytest.raises(InputError, match=r"of down_proj, but .* of down_proj and gate_up_proj in"):
        aggregate([tmp_path / "round"], tmp_path / "out")


def test_configs_of_large_models_stay_small(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.self_attn.q_proj": (3, 4) for i in range(200)}
    own = {"target_modules": ["q_proj"]}
    for k, name in enumerate("ab"):
        make(tmp_path / "round", Spec(name, rank=k + 1, shapes=shapes, config=own))

    aggregate([tmp_path / "round"], tmp_path / "out")

    assert config(tmp_path / "out")["target_modules"] == ["q_proj"]
    assert (tmp_path / "out/adapter_config.json").stat().st_size < 1000


@pytest.mark.parametrize("name", ["e", "re", "ore"])
def test_one_client_cannot_choose_which_modules_are_to_be_saved(tmp_path: Path, name: str) -> None:
    """`wte` and `wpe` end in e, and PEFT would miss tensors of them."""
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )
    fields: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    for k, client in enumerate("abc"):
        train(base, tmp_path / "round" / client, k, r=2, modules_to_save=["score"], **fields)
    folder = tmp_path / "round/c"
    (folder / "adapter_config.json").write_text(
        json.dumps(config(folder) | {"modules_to_save": [name]})
    )

    aggregate([tmp_path / "round"], tmp_path / "out")

    assert config(tmp_path / "out")["modules_to_save"] == ["score"]
    load(base, tmp_path / "out")


@pytest.mark.parametrize("name", ["([a-z_.0-9]+)+X", "((", "s|core", "sc*ore"])
def test_expressions_among_modules_to_save_are_refused(tmp_path: Path, name: str) -> None:
    """PEFT would run them on all names of the model."""
    make(tmp_path / "round", Spec("a", rank=2))
    make(tmp_path / "round", Spec("b", rank=2, config={"modules_to_save": [name]}))

    with pytest.raises(InputError, match=r"b/adapter_config\.json: modules_to_save names '"):
        aggregate([tmp_path / "round"], tmp_path / "out")
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(on_bad_client="skip"))

    assert config(tmp_path / "out")["modules_to_save"] is None
