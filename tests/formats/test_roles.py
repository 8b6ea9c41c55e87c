"""What tensors beside the factors are: base weights under any name, copies, rows, tied modules."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import Spec, make
from support.damage import set_config
from support.peft_versions import needs_peft, older_than

from fedlora_cli import (
    AggregateOptions,
    InputError,
    InspectOptions,
    aggregate,
    distribute,
    formats,
    inspect,
)
from fedlora_cli.errors import raise_fault
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.linalg.rounding import precision, same_up_to_rounding

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SAMPLES = (1, 3)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GPT: dict[str, Any] = {"vocab_size": 64, "n_layer": 1, "n_head": 2}
#: Exact: the output has the ranks of all clients together.
EXACT = AggregateOptions(method="flexlora", rank=6, verify=True)

#: The class of a model, its config, a module to adapt, and the names of its embeddings.
MODELS: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    "GPT2": ("LMHeadModel", GPT | {"n_embd": 16}, "c_attn", {"transformer.wte", "lm_head"}),
    "Bloom": (
        "ForCausalLM",
        GPT | {"hidden_size": 16},
        "query_key_value",
        {"transformer.word_embeddings", "lm_head"},
    ),
    "GPTNeoX": (
        "ForCausalLM",
        SMALL | {"intermediate_size": 24},
        "query_key_value",
        {"gpt_neox.embed_in", "lm_head"},
    ),
    "Mamba": (
        "ForCausalLM",
        {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1},
        "in_proj",
        {"backbone.embeddings", "lm_head"},
    ),
    "Bert": (
        "ForMaskedLM",
        SMALL | {"intermediate_size": 24},
        "query",
        {"bert.embeddings.word_embeddings", "cls.predictions.decoder"},
    ),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        "q",
        {"shared", "lm_head"},
    ),
    "Phi": (
        "ForCausalLM",
        SMALL | {"intermediate_size": 24},
        "q_proj",
        {"model.embed_tokens", "lm_head"},
    ),
    "CTRL": ("LMHeadModel", GPT | {"n_embd": 16, "dff": 16}, "Wq", {"transformer.w", "lm_head"}),
}


def make_base(folder: Path, name: str, **changes: Any) -> Path:
    kind, sizes, _, _ = MODELS.get(name, LLAMA)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **changes)
    getattr(transformers, name + kind)(config).save_pretrained(folder)
    return folder


LLAMA = ("ForCausalLM", SMALL | {"intermediate_size": 24}, "q_proj", {"model.embed_tokens"})


def load(base: Path, name: str, vocabulary: int = 0, seed: int = 7, **options: Any) -> Any:
    """The base model, with a larger vocabulary if one is given, drawn by the seed."""
    kind = MODELS.get(name, LLAMA)[0]
    model = getattr(transformers, name + kind).from_pretrained(base, **options)
    if vocabulary:
        torch.manual_seed(seed)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def train(model: Any, folder: Path, k: int, **fields: Any) -> PeftModel:
    """A client whose trained values are random, saved by PEFT."""
    r = 2 * (k + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, LoraConfig(r=r, lora_alpha=3 * r, **fields))
        generator = torch.Generator().manual_seed(k)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        trained.save_pretrained(folder)
    (folder / "fedlora.json").write_text(json.dumps({"samples": SAMPLES[k]}))
    return trained


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT adds to every weight, in float64."""
    return {
        name: layer.get_delta_weight("default").double()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A")
    }


def mean(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    total = sum(SAMPLES)
    return {
        name: sum(n * part[name].double() for n, part in zip(SAMPLES, parts, strict=True)) / total
        for name in parts[0]
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-5, atol=1e-5)


def opened(model: Any, folder: Path, passed_over: str = "-") -> PeftModel:
    """The adapter as PEFT loads it, which must find nothing else to warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", passed_over)
        return PeftModel.from_pretrained(model, folder)


#: PEFT says so of the clients' own adapters, too.
UNTIED = "Model (has|with) `tie_word_embeddings=True`"


def others(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors but factors, by name."""
    tensors = load_file(folder / WEIGHTS)
    return {name.removeprefix(PREFIX): one for name, one in tensors.items() if "lora_" not in name}


@pytest.mark.parametrize("name", MODELS)
def test_the_embeddings_of_a_resized_vocabulary_are_base_weights(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name)
    _, _, target, embeddings = MODELS[name]
    fields = {"target_modules": [target], "fan_in_fan_out": name == "GPT2"}
    parts = [
        updates(train(load(base, name, 70), tmp_path / "c" / one, k, **fields))
        for k, one in enumerate("ab")
    ]

    aggregate(tmp_path / "c", tmp_path / "out", EXACT)

    stored = others(tmp_path / "out")
    if name == "Bloom" and older_than("0.21"):  # PEFT stored the layer norm of a longer name, too
        embeddings = embeddings | {"transformer.word_embeddings_layernorm"}
    assert {one for one in stored if one.endswith("weight")} == {f"{e}.weight" for e in embeddings}
    assert stored.keys() == others(tmp_path / "c/a").keys()
    # Another seed: what PEFT loads, replaces what was drawn.
    loaded = opened(load(base, name, 70, seed=1), tmp_path / "out")
    assert_equal(updates(loaded), mean(parts))
    expected = load(base, name, 70).state_dict()
    for one in stored:
        assert torch.equal(loaded.get_base_model().state_dict()[one], expected[one])


@pytest.mark.parametrize("name", ["Phi", "CTRL", "Bert"])
def test_a_head_is_written_as_it_is_wrapped_whatever_clients_wrap(
    name: str, tmp_path: Path
) -> None:
    """One client adapts the head, which gets `.base_layer` before its weight and bias."""
    base = make_base(tmp_path / "base", name)
    _, _, target, embeddings = MODELS[name]
    head = next(one for one in embeddings if one in ("lm_head", "cls.predictions.decoder"))
    for k, one in enumerate("ab"):
        targets = [target, head] if k else [target]
        train(load(base, name, 70), tmp_path / "c" / one, k, target_modules=targets)

    report = aggregate(tmp_path / "c", tmp_path / "out", EXACT)

    stored = others(tmp_path / "out")
    assert {f"{head}.base_layer.weight", f"{head}.base_layer.bias"} <= stored.keys()
    assert not {f"{head}.weight", f"{head}.bias"} & stored.keys()
    left_out = [warning for warning in report.warnings if "left out" in warning]
    assert not any(head in warning for warning in left_out)
    loaded = opened(load(base, name, 70, seed=1), tmp_path / "out", UNTIED)
    bias = load(base, name, 70).state_dict()[f"{head}.bias"]
    assert torch.equal(loaded.get_base_model().state_dict()[f"{head}.base_layer.bias"], bias)


def test_a_head_with_a_bias_is_base_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "Phi")
    parts = [
        updates(train(load(base, "Phi"), tmp_path / "c" / one, k, target_modules=["lm_head"]))
        for k, one in enumerate("ab")
    ]

    aggregate(tmp_path / "c", tmp_path / "out", EXACT)

    assert "lm_head.base_layer.bias" in others(tmp_path / "out")
    assert_equal(updates(opened(load(base, "Phi"), tmp_path / "out")), mean(parts))


def test_a_bias_that_is_trained_is_averaged_whatever_clients_wrap(tmp_path: Path) -> None:
    """Under bias "all", PEFT stores the bias of a module by another name where it adapts it."""
    base = make_base(tmp_path / "base", "Phi")
    for k, target in enumerate(("q_proj", "k_proj")):
        model = load(base, "Phi")
        train(model, tmp_path / "c" / target, k, target_modules=[target], bias="all")

    aggregate(tmp_path / "c", tmp_path / "out", EXACT)

    q = "model.layers.0.self_attn.q_proj"
    one, other = others(tmp_path / "c/k_proj"), others(tmp_path / "c/q_proj")
    # Clients are taken by name, samples as they were told.
    expected = (1 * other[f"{q}.base_layer.bias"] + 3 * one[f"{q}.bias"]) / 4
    loaded = opened(load(base, "Phi"), tmp_path / "out").get_base_model().state_dict()
    torch.testing.assert_close(loaded[f"{q}.base_layer.bias"], expected)


@pytest.mark.parametrize("tensors", ["norm", "layer", "three", "bias", "wide bias"])
def test_what_need_not_be_an_embedding_is_refused(tensors: str, tmp_path: Path) -> None:
    found: dict[str, dict[str, torch.Tensor]] = {
        "norm": {"model.norm.weight": torch.ones(4)},
        "layer": {"model.layers.0.mlp.gate.weight": torch.ones(5, 4)},
        "three": {f"projector.{name}.weight": torch.ones(5, 4) for name in ("a", "b", "c")},
        "bias": {"projector.bias": torch.ones(5)},
        "wide bias": {"wte.weight": torch.ones(5, 4), "wte.bias": torch.ones(4)},
    }
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2, tensors=found[tensors]))

    with pytest.raises(InputError, match="not understood; train plain LoRA"):
        aggregate(tmp_path / "round", tmp_path / "out")


@pytest.mark.parametrize("embedding", ["wte", "model.embed_tokens", "word_embeddings"])
@pytest.mark.parametrize("holders", ["ab", "b"])
def test_tensors_named_like_an_embedding_and_longer_are_base_weights(
    embedding: str, holders: str, tmp_path: Path
) -> None:
    """PEFT before 0.21 stores them beside the embedding of a resized vocabulary."""
    stored = {f"{embedding}.weight": torch.ones(5, 4)}
    longer = {f"{embedding}_norm.{leaf}": torch.full((4,), 2.0) for leaf in ("weight", "bias")}
    for name in "ab":
        tensors = stored | (longer if name in holders else {})
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    report = aggregate(tmp_path / "round", tmp_path / "out")

    found = others(tmp_path / "out")
    assert any(f"{embedding}_norm" in one for one in report.warnings) == (holders == "b")
    expected = stored | longer if holders == "ab" else stored
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_trained_tensors_named_like_an_embedding_and_longer_are_refused(tmp_path: Path) -> None:
    for value, name in enumerate("ab"):
        tensors = {"wte.weight": torch.ones(5, 4), "wte_norm.weight": torch.full((4,), value)}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    with pytest.raises(InputError, match=r"wte_norm.weight differ .* modules_to_save"):
        aggregate(tmp_path / "round", tmp_path / "out")


def test_a_matrix_that_clients_trained_is_never_taken_for_base_weights(tmp_path: Path) -> None:
    for value, name in enumerate("ab"):
        tensors = {"projector.weight": torch.full((5, 4), float(value))}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    with pytest.raises(InputError, match=r"projector.weight differ .* modules_to_save"):
        aggregate(tmp_path / "round", tmp_path / "out")


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = {f"lm_head{one}.weight": torch.ones(5, 4) for one in ("", ".base_layer")}
    make(tmp_path / "round", Spec("a", rank=2, tensors=tensors))

    with pytest.raises(InputError, match=r"another tensor has the name .*lm_head.weight, too"):
        aggregate(tmp_path / "round", tmp_path / "out")


@pytest.mark.parametrize("indices", [[64, 65, 66], {"embed_tokens": [66, 64, 65]}])
@pytest.mark.parametrize("tie", [True, False])
def test_tokens_of_a_resized_vocabulary(tie: bool, indices: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "Llama", tie_word_embeddings=tie)
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    trained = [
        train(load(base, "Llama", 68), tmp_path / "c" / one, k, **fields)
        for k, one in enumerate("ab")
    ]

    aggregate(tmp_path / "c", tmp_path / "out", EXACT)

    loaded = opened(load(base, "Llama", 68, seed=1), tmp_path / "out")
    assert_equal(updates(loaded), mean([updates(one) for one in trained]))
    rows = [{"": one.get_input_embeddings().weight.detach()} for one in trained]
    assert_equal({"": loaded.get_input_embeddings().weight.detach()}, mean(rows))
    heads = [{"": one.get_output_embeddings().weight.detach()} for one in trained]
    assert_equal({"": loaded.get_output_embeddings().weight.detach()}, mean(heads))


KWARGS: dict[str, dict[str, Any]] = {
    "saved embedding": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "saved head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "neither": {"target_modules": ["q_proj"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
}


TIES_ANY = needs_peft("0.19", "tie a head only to an embedding that modules_to_save names")
TIES_BOTH = needs_peft("0.19", "untie a head that modules_to_save names beside its embedding")
TIES_TIED = needs_peft("0.20", "tie the head of a model that does not tie it")


def tying(tie: bool, flag: bool, kind: str) -> list[pytest.MarkDecorator]:
    """What a case of weight tying needs of PEFT."""
    if not flag or kind == "neither":
        return []
    if not tie:
        return [TIES_TIED] if "saved" in kind else []
    return [TIES_BOTH if kind == "saved embedding" else TIES_ANY]


@pytest.mark.parametrize(
    ("tie", "flag", "vocabulary", "kind"),
    [
        pytest.param(tie, flag, vocabulary, kind, marks=tying(tie, flag, kind))
        for tie, flag, vocabulary in [
            (True, True, 0),
            (True, False, 0),
            (False, True, 0),
            (False, False, 0),
            (True, True, 70),
            (True, False, 70),
            (False, True, 70),
        ]
        for kind in KWARGS
    ],
)
def test_ensure_weight_tying(
    tie: bool, flag: bool, vocabulary: int, kind: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "Llama", tie_word_embeddings=tie)
    trained = [
        train(
            load(base, "Llama", vocabulary),
            tmp_path / "c" / one,
            k,
            ensure_weight_tying=flag,
            task_type="CAUSAL_LM",
            **json.loads(json.dumps(KWARGS[kind])),
        )
        for k, one in enumerate("ab")
    ]

    aggregate(tmp_path / "c", tmp_path / "out", EXACT)
    distribute(tmp_path / "out", tmp_path / "next", [tmp_path / "c/a"])

    tied = tie and flag and kind != "neither"
    assert json.loads((tmp_path / "out" / CONFIG).read_text()).get(
        "ensure_weight_tying", False
    ) is (tied)
    loaded = opened(load(base, "Llama", vocabulary), tmp_path / "out", UNTIED)
    handed = opened(load(base, "Llama", vocabulary), tmp_path / "next/a", UNTIED)
    assert_equal(updates(loaded), mean([updates(one) for one in trained]))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        saved = [
            {"": getattr(one, get)().modules_to_save.default.weight.detach()}
            for one in trained
            if hasattr(getattr(one, get)(), "modules_to_save")
        ]
        if saved:
            layer = getattr(loaded, get)().modules_to_save.default
            assert_equal({"": layer.weight.detach()}, mean(saved))
    if tied:
        for model in (loaded, handed):
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            if "saved" in kind:
                pair = [one.modules_to_save.default.weight for one in (embedding, head)]
            else:
                pair = [embedding.lora_embedding_A.default.T, head.lora_B.default.weight]
            assert pair[0].data_ptr() == pair[1].data_ptr()


@TIES_ANY
def test_factors_tied_in_some_clients_only_are_averaged_one_by_one(tmp_path: Path) -> None:
    """Without the field, PEFT adapts the embedding of a tied model alone."""
    base = make_base(tmp_path / "base", "Llama", tie_word_embeddings=True)
    trained = [
        train(
            load(base, "Llama"),
            tmp_path / "c" / one,
            k,
            ensure_weight_tying=k == 1,
            target_modules=["q_proj", "embed_tokens"],
        )
        for k, one in enumerate("ab")
    ]

    aggregate(
        tmp_path / "c",
        tmp_path / "out",
        AggregateOptions(method="flexlora", rank=6, missing="zero"),
    )

    assert "ensure_weight_tying" not in json.loads((tmp_path / "out" / CONFIG).read_text())
    one, other = map(updates, trained)
    head = f"{PREFIX}lm_head"
    one[head] = torch.zeros_like(other[head])
    loaded = opened(load(base, "Llama"), tmp_path / "out", UNTIED)
    assert_equal(updates(loaded), mean([one, other]))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_weights_of_another_dtype_are_the_same(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The base model is stored in one dtype; the second of three clients loads it in another."""
    generator = torch.Generator().manual_seed(0)
    # Tiny values too: float16 rounds them, or has none of them.
    base = torch.randn(64, 16, generator=generator) * torch.logspace(-9, 0, 64)[:, None]
    loaded = base.to(stored)
    for name in "abc":
        own = loaded.to(dtype) if name == "b" else loaded
        make(tmp_path / "round", Spec(name, rank=2, tensors={"lm_head.weight": own.clone()}))
    for policy in ("refuse", "skip"):
        report = aggregate(
            tmp_path / "round",
            tmp_path / policy,
            AggregateOptions(on_bad_client=policy, verify=True),
        )
        assert report.left_out == ()
        assert torch.equal(others(tmp_path / policy)["lm_head.weight"], loaded)
    assert inspect(tmp_path / "round", InspectOptions(values=True)).faults == ()

    changed = load_file(tmp_path / "round/b" / WEIGHTS)
    changed[f"{PREFIX}lm_head.weight"][-1] *= 1.5
    save_file(changed, tmp_path / "round/b" / WEIGHTS)

    with pytest.raises(InputError, match=r"b/adapter_model.*base weights lm_head.weight differ"):
        aggregate(tmp_path / "round", tmp_path / "no")
    skip = AggregateOptions(on_bad_client="skip")
    report = aggregate(tmp_path / "round", tmp_path / "without", skip)
    assert [one.name for one in report.left_out] == ["b"]
    assert len(inspect(tmp_path / "round", InspectOptions(values=True)).faults) == 1


def test_three_precisions_are_one_base(tmp_path: Path) -> None:
    """No two clients have the same bytes, and one is wrong."""
    base = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) / 50
    versions = {
        "a": base,
        "b": base.bfloat16(),
        "c": base.half(),
        "d": base.bfloat16().float(),
        "e": base.flip(0),
    }
    for name, own in versions.items():
        make(tmp_path / "round", Spec(name, rank=2, tensors={"lm_head.weight": own}))

    skip = AggregateOptions(on_bad_client="skip", verify=True)
    report = aggregate(tmp_path / "round", tmp_path / "out", skip)

    assert [one.name for one in report.left_out] == ["e"]


def test_rounding() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    step = 1 + torch.finfo(torch.bfloat16).eps
    assert precision(x) == torch.float32
    assert precision(x.bfloat16().float()) == torch.bfloat16
    assert precision(x.half().double()) == torch.float16
    assert same_up_to_rounding(x, x.bfloat16())
    assert same_up_to_rounding(x.bfloat16(), x.half())
    assert same_up_to_rounding(x.bfloat16(), x.bfloat16().half().float())
    assert not same_up_to_rounding(x, x * (1 + 1e-6))
    assert not same_up_to_rounding(x.bfloat16(), (x.bfloat16() * step).bfloat16())
    assert not same_up_to_rounding(x, (x * 1.02).bfloat16())
    assert not same_up_to_rounding(x, x[:10])
    assert same_up_to_rounding(torch.arange(3), torch.arange(3))
    assert not same_up_to_rounding(torch.arange(3), torch.arange(1, 4))


@pytest.mark.parametrize("value", [True, 2.0, "on", {"a": 1}, [1], 0])
def test_a_field_that_is_not_known_is_told_and_agreed_on(value: Any, tmp_path: Path) -> None:
    for name in "abc":
        make(tmp_path / "round", Spec(name, rank=2))
        set_config(tmp_path / "round" / name, use_newlora=value)

    report = aggregate(tmp_path / "round", tmp_path / "out")

    found = f"may change the meaning of the tensors: use_newlora = {json.dumps(value)}"
    assert any(warning.endswith(found) for warning in report.warnings)
    options = AggregateOptions(previous=tmp_path / "out")
    aggregate(tmp_path / "round", tmp_path / "next", options)
    distribute(tmp_path / "out", tmp_path / "handed", [tmp_path / "round/a"])
    shutil.copytree(tmp_path / "round", tmp_path / "mixed")
    set_config(tmp_path / "mixed/b", use_newlora=None)
    with pytest.raises(InputError, match="b: its unknown fields are none, but use_newlora"):
        aggregate(tmp_path / "mixed", tmp_path / "no")


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_field_that_is_not_known_and_off_is_nothing(value: Any, tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2))
    set_config(tmp_path / "round/a", use_newlora=value)

    report = aggregate(tmp_path / "round", tmp_path / "out")

    assert not any("newlora" in warning for warning in report.warnings)


def test_every_field_of_peft_is_known(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "Llama")
    train(load(base, "Llama"), tmp_path / "a", 0, target_modules=["q_proj"])
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    # A value that no field has: what is known refuses it, or passes over it.
    set_config(tmp_path / "a", **{one: {"x": 1} for one in fields.keys() - {"peft_type"}})

    [adapter] = inspect(tmp_path / "a").adapters

    assert not any("not known" in note for note in adapter.notes)


@pytest.mark.parametrize("field", ["corda_config", "lora_ga_config", "loftq_config", "eva_config"])
def test_the_config_of_an_initialisation_that_is_not_used_is_nothing(
    field: str, tmp_path: Path
) -> None:
    """PEFT leaves it where it has converted the adapter to plain LoRA."""
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2, config={field: {"x": 1}}))

    report = aggregate(tmp_path / "round", tmp_path / "out")

    assert not any(field in warning for warning in report.warnings)


def test_the_layout_of_experts_that_peft_does_not_load_is_refused(tmp_path: Path) -> None:
    config = {"target_parameters": ["mlp.experts.up"], "lora_B_layout": "grouped_by_expert"}
    make(tmp_path / "round", Spec("a", rank=2, config=config))
    make(tmp_path / "plain", Spec("a", rank=2, config={"lora_B_layout": "grouped_by_expert"}))

    with pytest.raises(InputError, match=r"lora_B_layout is 'grouped_by_expert'.* rank_major"):
        aggregate(tmp_path / "round", tmp_path / "out")
    report = aggregate(tmp_path / "plain", tmp_path / "out")  # without experts, it says nothing
    assert not any("lora_B_layout" in warning for warning in report.warnings)


def test_what_is_tied_is_told_by_reading_each_tensor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many tensors are twice the work, not four times."""
    calls: list[str] = []
    original = TensorInfo.read

    def read(self: TensorInfo, report: Any = raise_fault) -> torch.Tensor:
        calls.append(self.key)
        return original(self, report)

    monkeypatch.setattr(TensorInfo, "read", read)
    reads = []
    for count in (20, 40):
        tensors = {f"heads.h{n}.weight": torch.full((5, 4), float(n)) for n in range(count)}
        config = {"modules_to_save": ["heads", "lm_head"], "ensure_weight_tying": True}
        made = make(tmp_path / str(count), Spec("a", rank=2, tensors=tensors, config=config))
        calls.clear()
        formats.read(made.folder)
        reads.append(len(calls))

    assert reads == [20, 40]


def test_damaged_ties_are_no_crash(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": torch.zeros(0, 4), "x.lm_head.weight": torch.zeros(0, 4)}
    config = {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    make(tmp_path / "round", Spec("a", rank=2, tensors=tensors, config=config))
    odd = {"wte.lora_embedding_A": torch.ones(2, 3, 4), "wte.lora_embedding_B": torch.ones(4, 3, 2)}
    fields = {"target_modules": ["wte", "q_proj", "v_proj", "lm_head"], "ensure_weight_tying": True}
    make(tmp_path / "round", Spec("b", rank=2, tensors=odd, config=fields))

    faults = inspect(tmp_path / "round").faults

    assert any("wte" in fault.found for fault in faults)
