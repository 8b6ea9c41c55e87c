"""`--target`: what a server could not load is refused before the work."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.adapters import Spec, make
from support.cli import run
from typer.testing import Result

from fedlora_cli import AggregateOptions, InputError, UsageError, aggregate
from fedlora_cli.adapters.adapter import AdapterMetadata, FactorLayout, FullTensor, Kind, Role
from fedlora_cli.aggregation.base_model import ties_embeddings
from fedlora_cli.aggregation.options import Target
from fedlora_cli.formats.server_checks import Output
from fedlora_cli.formats.serving import TARGETS, obstacles

Q, LAYER = "model.layers.0.self_attn.q_proj", "model.layers.0"
V = "model.layers.0.self_attn.v_proj"


@dataclass(frozen=True)
class Case:
    """An output, and by target a word of the obstacle that it meets; of others it meets none.

    SGLang loads no q without v: the factors of both are the plainest adapter.
    """

    refused: dict[str, str]
    rank: int | None = 16
    layouts: tuple[FactorLayout, ...] = (FactorLayout("linear", Q), FactorLayout("linear", V))
    tensors: dict[str, Role] = field(default_factory=dict)
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    format: str = "peft"
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    saved: tuple[str, ...] = ()
    tied: bool | None = None
    shape: tuple[int, ...] = (4, 4)


def linear(*names: str) -> tuple[FactorLayout, ...]:
    """Factors of these modules, each in every one of two layers, or elsewhere if it is dotted."""
    layers = ("model.layers.0.", "model.layers.1.")
    full = (f"{layer}{name}" for name in names for layer in layers if "/" not in name)
    return tuple(
        FactorLayout("linear", name) for name in (*full, *(n[1:] for n in names if "/" in n))
    )


def layout(kind: Kind, name: str) -> tuple[FactorLayout, ...]:
    return FactorLayout("linear", Q), FactorLayout("linear", V), FactorLayout(kind, name)


def served(what: str, *targets: str) -> dict[str, str]:
    return dict.fromkeys(targets, what)


EXPERTS = f"{LAYER}.mlp.experts"
SERVERS = ("vllm", "sglang", "llama.cpp")
CASES = {
    "plain": Case({}),
    "rank 300": Case({}, rank=300),
    "rank 512": Case({}, rank=512),
    "rank 513": Case({"vllm": "rank 513 (its largest --max-lora-rank is 512)"}, rank=513),
    "a rank to be decided": Case({}, rank=None),
    "embedding": Case({}, layouts=layout("embedding", "model.embed_tokens")),
    "embedding of an untied base": Case(
        {}, layouts=layout("embedding", "model.embed_tokens"), tied=False
    ),
    "embedding of a tied base": Case(
        served("factors of model.embed_tokens on a base model that ties", "llama.cpp"),
        layouts=layout("embedding", "model.embed_tokens"),
        tied=True,
    ),
    "head of a tied base": Case(
        served("factors of lm_head on a base model that ties", "llama.cpp"),
        layouts=layout("linear", "lm_head"),
        tied=True,
    ),
    "head of an untied base": Case({}, layouts=layout("linear", "lm_head"), tied=False),
    "embedding by another name": Case(
        served("factors of transformer.wte on a base model that ties", "llama.cpp")
        | served("modules outside the numbered layers", "sglang"),
        layouts=layout("embedding", "transformer.wte"),
        tied=True,
    ),
    "a tied base without its embeddings": Case({}, tied=True),
    "embedding of positions": Case(
        served("embeddings of something other than tokens (model.layers.0.wpe)", "llama.cpp"),
        layouts=layout("embedding", "model.layers.0.wpe"),
        tied=False,
    ),
    "q without v": Case(
        served("q_proj without v_proj", "sglang"), layouts=linear("self_attn.q_proj")
    ),
    "k without q": Case(
        served("k_proj without q_proj", "sglang"), layouts=linear("self_attn.k_proj")
    ),
    "v without q": Case(
        served("v_proj without q_proj", "sglang"), layouts=linear("self_attn.v_proj")
    ),
    "q without v in one layer": Case(
        served("model.layers.0.self_attn.q_proj without v_proj", "sglang"),
        layouts=tuple(
            one for one in linear("self_attn.q_proj", "self_attn.v_proj") if one.pair != V
        ),
    ),
    "q without k beside another k": Case(
        served("self_attn.q_proj without k_proj", "sglang"),
        layouts=linear("self_attn.q_proj", "self_attn.v_proj", "other.qk_proj"),
    ),
    "q and v without k": Case({}, layouts=linear("self_attn.q_proj", "self_attn.v_proj")),
    "up without gate": Case(
        served("up_proj without gate_proj", "sglang"), layouts=linear("mlp.up_proj")
    ),
    "gate without up": Case({}, layouts=linear("mlp.gate_proj")),
    "an expert's w3 without w1": Case(
        served("w3 without w1", "sglang"), layouts=linear("mlp.experts.0.w3")
    ),
    "latent attention": Case(
        {}, layouts=linear("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    ),
    "half of latent attention": Case(
        served("kv_a_proj_with_mqa without q_a_proj", "sglang"),
        layouts=linear("self_attn.kv_a_proj_with_mqa"),
    ),
    "fused q, k and v": Case({}, layouts=linear("self_attn.qkv_proj", "mlp.gate_up_proj")),
    "GPT-2's names": Case(
        served(
            "modules outside the numbered layers, except embed_tokens and lm_head (h.0.c_attn)",
            "sglang",
        ),
        layouts=linear("/h.0.c_attn"),
    ),
    "a projector": Case(
        served("modules outside the numbered layers", "sglang"),
        layouts=layout("linear", "multi_modal_projector.linear_1"),
    ),
    "an image and a text model": Case(
        served("two modules of one name in one layer", "sglang"),
        layouts=linear("mlp.down_proj", "/vision.layers.0.mlp.down_proj"),
    ),
    "two attentions": Case(
        served("two modules of one name in one layer", "sglang"),
        layouts=linear("self_attn.out_proj", "encoder_attn.out_proj"),
    ),
    "experts one by one": Case(
        {}, layouts=linear(*(f"mlp.experts.{n}.down_proj" for n in range(4)), "mlp.down_proj")
    ),
    "an expert alone": Case(
        served(
            "experts that are not adapted alike (model.layers.0.mlp.experts.3.down_proj)",
            "llama.cpp",
        ),
        layouts=linear("mlp.experts.3.down_proj"),
    ),
    "experts that are adapted in part": Case(
        served("experts that are not adapted alike", "llama.cpp"),
        layouts=linear(
            "mlp.experts.0.down_proj", "mlp.experts.1.down_proj", "mlp.experts.1.gate_proj"
        ),
    ),
    "an expression": Case(
        served("an expression as target_modules", "sglang"), targets=r".*\.(q|v)_proj"
    ),
    "base weights of an embedding": Case(
        {}, tensors={"model.embed_tokens.base_layer.weight": "base"}
    ),
    "base weights of lm_head": Case({}, tensors={"lm_head.base_layer.weight": "base"}),
    "resized vocabulary": Case(
        served("weights of the base model (lm_head.weight)", *SERVERS),
        tensors={"lm_head.weight": "base"},
    ),
    "a linear score": Case(
        served("modules that are saved in full (score.weight)", "sglang", "llama.cpp"),
        tensors={"score.weight": "saved"},
        saved=("score",),
    ),
    "a linear classifier of a model in a model": Case(
        served("modules that are saved in full", "sglang", "llama.cpp"),
        tensors={"base.classifier.weight": "saved", "base.classifier.bias": "saved"},
        saved=("classifier",),
    ),
    "its full name": Case(
        served("modules that are saved in full", *SERVERS),
        tensors={"base.classifier.weight": "saved"},
        saved=("base.classifier",),
    ),
    "both heads": Case(
        served("modules that are saved in full (classifier.weight)", *SERVERS),
        tensors={"score.weight": "saved", "classifier.weight": "saved"},
        saved=("classifier", "score"),
    ),
    "a head of two layers": Case(
        served("modules that are saved in full", *SERVERS),
        tensors={"classifier.dense.weight": "saved", "classifier.out_proj.weight": "saved"},
        saved=("classifier",),
    ),
    "a head that is no matrix": Case(
        served("modules that are saved in full", *SERVERS),
        tensors={"score.weight": "saved"},
        saved=("score",),
        shape=(4,),
    ),
    "another head": Case(
        served("modules that are saved in full (lm_head.weight)", *SERVERS),
        tensors={"lm_head.weight": "saved"},
        saved=("lm_head",),
    ),
    # llama.cpp's converter keeps norms, its loader drops them: TODO stands there.
    "norms": Case(
        served("modules that are saved in full", *SERVERS),
        tensors={f"{LAYER}.input_layernorm.weight": "saved", "model.norm.weight": "saved"},
        saved=("input_layernorm", "norm"),
    ),
    "biases by the config alone": Case(
        served("bias lora_only in the config", "vllm"), metadata=AdapterMetadata(bias="lora_only")
    ),
    "DoRA": Case(
        served("DoRA", *SERVERS),
        tensors={f"{Q}.lora_magnitude_vector": "magnitude"},
        metadata=AdapterMetadata(dora=True),
    ),
    "biases": Case(
        served("trained biases", *SERVERS),
        tensors={f"{Q}.base_layer.bias": "bias"},
        metadata=AdapterMetadata(bias="lora_only"),
    ),
    "biases on lora_B": Case(
        served("biases on lora_B", *SERVERS),
        tensors={f"{Q}.lora_B.bias": "lora_bias"},
        metadata=AdapterMetadata(lora_bias=True),
    ),
    "tokens": Case(
        served("trained tokens", *SERVERS),
        tensors={"model.embed_tokens.token_adapter.trainable_tokens_delta[3]": "token"},
    ),
    "convolution": Case(
        served("factors of convolutions", *SERVERS), layouts=layout("convolution", "patch.conv")
    ),
    "both pairs of experts": Case(
        served("factors of fused experts", "sglang", "llama.cpp"),
        layouts=(
            FactorLayout("experts", EXPERTS),
            FactorLayout("experts", f"{EXPERTS}.base_layer"),
        ),
    ),
    "one pair of experts": Case(
        {"vllm": "experts with only one of"}
        | served("factors of fused experts", "sglang", "llama.cpp"),
        layouts=layout("experts", EXPERTS),
    ),
    "activated LoRA": Case(
        served("activated LoRA", "vllm", "sglang"),
        metadata=AdapterMetadata(invocation_tokens=(1, 2)),
    ),
    "replicated layers": Case(
        served("replicated layers", *SERVERS),
        metadata=AdapterMetadata(layer_replication=((0, 2), (1, 3))),
    ),
    "Conv1D": Case(
        {"llama.cpp": "factors of GPT-2's Conv1D"}, metadata=AdapterMetadata(fan_in_fan_out=True)
    ),
    "kohya": Case(served("adapters in the format kohya", *TARGETS), format="kohya"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_server_loads_what_its_sources_say(case: Case, target: str) -> None:
    tensors = {
        name: FullTensor(
            case.shape if name.endswith(".weight") else (4,),
            "float32",
            role,
            name.rpartition(".")[0] if role == "saved" else None,
            lambda report=None: torch.zeros(4),
        )
        for name, role in case.tensors.items()
    }
    output = Output(
        *(case.format, case.rank, None, case.layouts, tensors, case.metadata),
        targets=case.targets,
        saved=case.saved,
        tied=case.tied,
    )
    found = obstacles(target, output)

    assert len(found) == (target in case.refused)
    for one in found:
        assert case.refused[target] in one.found
        assert one.cure


def test_the_targets_are_those_of_the_option() -> None:
    assert tuple(TARGETS) == get_args(Target)


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """Two clients, one of which has more directions than any engine takes."""
    shapes = {Q: (600, 620)}
    make(tmp_path / "round", Spec("ann", rank=2, shapes=shapes))
    make(tmp_path / "round", Spec("bob", rank=590, shapes=shapes))
    return tmp_path / "round"


def with_head(root: Path) -> Path:
    made = {"tensors": {"head.weight": torch.ones(2, 4)}, "config": {"modules_to_save": ["head"]}}
    kept: dict[str, Any] = made
    for name, rank in (("ann", 2), ("bob", 590)):
        make(root / "heads", Spec(name, rank=rank, shapes={Q: (600, 620)}, **kept))
    return root / "heads"


def test_a_rank_is_the_fault_of_the_option_that_decides_it(clients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"^--target: vllm cannot load rank 590 .*; give --rank 512 or less"
    ):
        aggregate(clients, out, AggregateOptions(target="vllm", dry_run=True))
    with pytest.raises(
        UsageError, match=r"^--rank: vllm cannot load rank 550 .*; give --rank 512 or less"
    ):
        aggregate(clients, out, AggregateOptions(target="vllm", rank=550))
    with pytest.raises(UsageError, match=r"^--energy: vllm cannot load rank 5\d\d "):
        aggregate(clients, out, AggregateOptions(target="vllm", method="flexlora", energy=1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["round"]
    with pytest.raises(
        UsageError, match="--target: 'tgi' is out of range; it must be one of peft, vllm"
    ):
        aggregate(clients, out, AggregateOptions(target="tgi"))  # type: ignore[arg-type]


def test_all_that_stands_in_the_way_is_one_line(tmp_path: Path) -> None:
    folder, out = with_head(tmp_path), tmp_path / "out"

    message = (
        "--target: vllm cannot load rank 590 (its largest --max-lora-rank is 512), "
        "modules that are saved in full (head.weight); "
        "give --rank 512 or less, train without modules_to_save"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        aggregate(folder, out, AggregateOptions(target="vllm", rank=590))
    assert not out.exists()


def test_the_command_refuses_and_otherwise_changes_no_byte(clients: Path, tmp_path: Path) -> None:
    def ann(out: str, *options: str) -> Result:
        return run("aggregate", clients / "ann", "-o", tmp_path / out, *options)

    assert ann("bad", "--target", "ollama").exit_code == 2
    wide = run("aggregate", clients, "-o", tmp_path / "bad", "--target", "vllm")
    assert (wide.exit_code, wide.stdout) == (3, "")
    assert not (tmp_path / "bad").exists()

    plain, targeted = ann("plain"), ann("targeted", "--target", "vllm")
    assert (plain.exit_code, targeted.exit_code) == (0, 0)
    assert "--target vllm" in targeted.stderr
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "fedlora.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "targeted" / name
        ).read_bytes()


# The base model


def with_head_factors(root: Path, base: str, *names: str) -> Path:
    """Clients that adapt these modules, beside others, on a base model of that name."""
    shapes = {Q: (6, 8), V: (4, 8)} | dict.fromkeys(names, (10, 8))
    for name in ("ann", "bob"):
        config = {"base_model_name_or_path": base}
        make(root / "round", Spec(name, rank=2, shapes=shapes, config=config))
    return root / "round"


def a_base(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


TIED: dict[str, tuple[dict[str, Any], bool | None]] = {
    "it says so": ({"model_type": "llama", "tie_word_embeddings": True}, True),
    "it says no": ({"model_type": "gemma", "tie_word_embeddings": False}, False),
    "of its language model": ({"text_config": {"tie_word_embeddings": True}}, True),
    "the architecture ties": ({"model_type": "gemma"}, True),
    "the architecture does not": ({"model_type": "llama"}, False),
    "that of the language model does": (
        {"model_type": "nobody-knows", "text_config": {"model_type": "gpt2"}},
        True,
    ),
    "two words": (
        {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
        None,
    ),
    "no bool": ({"tie_word_embeddings": "yes"}, None),
    "no architecture": ({}, None),
    "an unknown architecture": ({"model_type": "nobody-knows"}, None),
}


@pytest.mark.parametrize("case", TIED)
def test_the_config_of_the_base_tells_whether_it_ties(tmp_path: Path, case: str) -> None:
    config, tied = TIED[case]
    assert ties_embeddings(a_base(tmp_path / "base", **config)) is tied


@pytest.mark.parametrize("base", [None, "", "org/none", "no name\0", "../..", "a" * 5000, "/dev"])
def test_a_base_that_is_not_here_tells_nothing(base: str | None) -> None:
    assert ties_embeddings(base) is None


def test_a_damaged_config_tells_nothing(tmp_path: Path) -> None:
    folder = Path(a_base(tmp_path / "base"))
    (folder / "config.json").write_text("{")
    assert ties_embeddings(str(folder)) is None
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert ties_embeddings(str(folder)) is None


@pytest.mark.parametrize("module", ["lm_head", "model.lm_head"])
def test_a_head_is_refused_loaded_or_doubted_as_the_base_says(tmp_path: Path, module: str) -> None:
    tied = a_base(tmp_path / "tied", model_type="llama", tie_word_embeddings=True)
    untied = a_base(tmp_path / "untied", model_type="llama")
    out = tmp_path / "out"
    options = AggregateOptions(target="llama.cpp")

    message = rf"^--target: llama.cpp cannot load factors of {module} on a base model that ties"
    with pytest.raises(InputError, match=message):
        aggregate(with_head_factors(tmp_path / "1", tied, module), out, options)
    assert not out.exists()

    loaded = aggregate(with_head_factors(tmp_path / "2", untied, module), out, options)
    assert not any("llama.cpp" in one for one in loaded.warnings)

    folder = with_head_factors(tmp_path / "3", "org/none", module)
    doubted = aggregate(folder, tmp_path / "doubted", options)
    assert [one for one in doubted.warnings if "llama.cpp" in one] == [
        f"llama.cpp loads factors of {module} only if the base model does not tie its embeddings; "
        "no config.json of the base model on this machine says so"
    ]
    elsewhere = aggregate(folder, tmp_path / "vllm", AggregateOptions(target="vllm"))
    assert not any("llama.cpp" in one for one in elsewhere.warnings)


def test_a_head_of_a_classifier_passes_for_vllm_by_the_names_in_the_config(tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "tensors": {"score.weight": torch.ones(2, 8)},
        "config": {"modules_to_save": ["classifier", "score"]},
    }
    shapes = {Q: (6, 8), V: (4, 8)}
    for name in ("ann", "bob"):
        make(tmp_path / "round", Spec(name, rank=2, shapes=shapes, **made))
    aggregate(tmp_path / "round", tmp_path / "out", AggregateOptions(target="vllm"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    with pytest.raises(InputError, match="sglang cannot load modules that are saved in full"):
        aggregate(tmp_path / "round", tmp_path / "none", AggregateOptions(target="sglang"))


def test_sglang_is_told_of_a_layer_that_it_cannot_pack(tmp_path: Path) -> None:
    other = "model.layers.1.self_attn.q_proj"
    for name in ("ann", "bob"):
        shapes = {Q: (6, 8), V: (4, 8), other: (6, 8)}
        make(tmp_path / "round", Spec(name, rank=2, shapes=shapes))
    message = f"sglang cannot load {other} without v_proj; add v_proj to target_modules"
    with pytest.raises(InputError, match=f"^--target: {re.escape(message)}$"):
        aggregate(tmp_path / "round", tmp_path / "out", AggregateOptions(target="sglang"))


def test_the_config_of_the_base_is_read_for_llama_cpp_alone(
    clients: Path, tmp_path: Path, monkeypatch
) -> None:
    from fedlora_cli.aggregation import target

    asked: list[str | None] = []
    monkeypatch.setattr(target, "ties_embeddings", asked.append)

    for server in ("peft", "vllm"):
        aggregate([clients], tmp_path / server, AggregateOptions(target=server, rank=64))

    assert asked == []
