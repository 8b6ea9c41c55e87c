"""Round 0 as PEFT would make it: the same modules, ranks and config, in every kind of layer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from support.adapters import CONFIG, PREFIX, WEIGHTS, config
from support.models import bert, gpt2, llama, save, vit, wrap
from support.peft_versions import EXPERTS_BY_NAME, NEWER_EXPERTS
from support.starts import Base, run, save_base
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fedlora_cli import (
    DistributeOptions,
    InitOptions,
    InputError,
    UsageError,
    aggregate,
    distribute,
    initialize,
    read,
)
from fedlora_cli.errors import VerificationError
from fedlora_cli.formats.peft.layers import adapted_modules
from fedlora_cli.libraries import muted
from fedlora_cli.rounds import acceptance, distribution

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts_per_tok": 1}
ROUTED: dict[str, Any] = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARAMETERS = ("experts.down_proj", "experts.gate_up_proj")


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=1))


def qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, num_experts=4))


def gpt_oss() -> PreTrainedModel:
    sizes = SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**sizes))


def llama4() -> PreTrainedModel:
    sizes = SIZES | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 24}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, interleave_moe_layer_step=1))


def glm4_moe() -> PreTrainedModel:
    """The first layer has no experts, the second has shared ones, too."""
    sizes = SIZES | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes))


def deepseek_v3() -> PreTrainedModel:
    sizes = SIZES | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, kv_lora_rank=8, q_lora_rank=8))


def whisper() -> PreTrainedModel:
    sides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 10}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 31, "d_model": 16, "max_source_positions": 6, "max_target_positions": 6}
    return WhisperForConditionalGeneration(WhisperConfig(**sides, **heads, **tokens, **sizes))


def siglip() -> PreTrainedModel:
    """Its pooling is torch's own attention, which PEFT wraps in two layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, **layers))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(
        MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return partial(save_base, tmp_path / "base")


def lora(**fields: Any) -> LoraConfig:
    lists = {key: list(one) if isinstance(one, tuple) else one for key, one in fields.items()}
    return LoraConfig(**lists)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in load_file(folder / WEIGHTS).items()}


def layers(model: PeftModel) -> dict[str, tuple[str, int, float, str | None]]:
    """Every layer that PEFT has put into a model: its kind, rank, scaling and parameter."""
    return {
        name: (
            type(layer).__name__,
            layer.r["default"],
            layer.scaling["default"],
            getattr(layer, "parameter_name", None),
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def loaded(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Any warning is an error, but for those that PEFT has for its own adapters: that ranks of
    parameters match no module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings(
            "ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning
        )
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True)


def set_fields(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


ALL: dict[str, Any] = {"target_modules": "all-linear"}
NAMES: dict[str, Any] = {"target_modules": SEVEN}
EXPLICIT: dict[str, Any] = {"target_modules": ("q_proj",), "target_parameters": PARAMETERS}

newer = partial(pytest.param, marks=NEWER_EXPERTS)
by_name = partial(pytest.param, marks=EXPERTS_BY_NAME)


@pytest.mark.parametrize(
    ("build", "choice"),
    [
        (mixtral, ALL),
        by_name(mixtral, {"target_modules": ("q_proj", "w1", "w2", "w3")}),
        newer(mixtral, EXPLICIT),
        (qwen3_moe, ALL),
        by_name(qwen3_moe, NAMES),
        (qwen3_moe, {"target_modules": r".*(k_proj|gate_proj|up_proj|down_proj)"}),
        newer(qwen3_moe, {"target_modules": ("v_proj",), "target_parameters": ("gate_up_proj",)}),
        (gpt_oss, ALL),
        newer(gpt_oss, EXPLICIT),
        (llama4, NAMES),
        newer(llama4, EXPLICIT),
        (glm4_moe, ALL),
        (glm4_moe, NAMES),
        (deepseek_v3, ALL),
        (llama, ALL),
        (llama, {"target_modules": ("embed_tokens", "lm_head", "q_proj")}),
        (gpt2, {"target_modules": ("c_attn", "wte")}),
        (bert, {"target_modules": ("query",), "task": "SEQ_CLS"}),
        (vit, {"target_modules": ("projection", "fc1"), "modules_to_save": ("classifier",)}),
        (whisper, {"target_modules": ("conv1", "conv2", "k_proj")}),
        (siglip, {"target_modules": ("head.attention",)}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value)),
)
def test_a_start_is_what_peft_makes_of_the_same_choice(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel], choice: dict[str, Any]
) -> None:
    """The tensors, the layers with their ranks and scalings, the meaning of a rank index, and the
    model's own words before training.
    """
    home = base(build)
    initialize(home, tmp_path / "out", options=InitOptions(ranks=(2, 5), alpha=3, **choice))
    with muted():
        model = type(build()).from_pretrained(home).eval()
    fields = {key: value for key, value in choice.items() if key != "task"}

    for rank in (2, 5):
        own = wrap(
            copy.deepcopy(model),
            lora(r=rank, lora_alpha=3, task_type=choice.get("task"), **fields),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own.save_pretrained(str(tmp_path / f"own-{rank}"), save_embedding_layers=False)
        folder = tmp_path / f"out/rank-{rank}"
        assert shapes(folder) == shapes(tmp_path / f"own-{rank}")
        start = loaded(model, folder)
        assert layers(start) == layers(own)
        assert {m.shape for m in read(folder).modules.values()} == {
            m.shape for m in read(tmp_path / f"own-{rank}").modules.values()
        }
        assert sum(p.requires_grad for p in start.parameters()) == len(load_file(folder / WEIGHTS))
    few, many = (read(tmp_path / f"out/rank-{rank}").modules for rank in (2, 5))
    for name, module in many.items():
        low, high = few[name].read(), module.read()
        assert 5 * low.rank == 2 * high.rank
        if module.layout.kind == "embedding":
            assert torch.equal(low.B, high.B[:, : low.rank])
            assert not high.A.any()
        else:
            assert torch.equal(low.A, high.A[: low.rank])
            bound = high.A.shape[1] ** -0.5
            assert 0.5 * bound < high.A.abs().max() <= bound
            assert not high.B.any()
    starts = [m.read() for m in many.values() if m.layout.kind != "embedding"]
    assert len({tuple(one.A[0, :3].tolist()) for one in starts}) == len(starts)


@EXPERTS_BY_NAME
@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_training_moves_every_direction_of_every_expert(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel]
) -> None:
    home = base(build)
    initialize(home, tmp_path / "out", options=InitOptions(ranks=(3,), **ALL))
    with muted():
        model = type(build()).from_pretrained(home).eval()
    start = loaded(model, tmp_path / "out/rank-3")
    ids = torch.arange(30).reshape(2, 15)

    assert torch.equal(start.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    start(input_ids=ids).logits.square().sum().backward()

    moved = {
        name: parameter.grad.abs().amax(dim=0)
        for name, parameter in start.named_parameters()
        if "lora_B" in name
    }
    assert len(moved) == 2 * 7
    # A token takes one expert here, and all of them are taken.
    assert all(direction.min() > 0 for direction in moved.values())


@EXPERTS_BY_NAME
def test_experts_go_through_a_round_and_back(tmp_path: Path, base: Base) -> None:
    """Init, train, aggregate, init like the clients: all of it in the same modules."""
    home = base(qwen3_moe)
    initialize(home, tmp_path / "start", options=InitOptions(ranks=(2, 4), **NAMES))
    with muted():
        model = Qwen3MoeForCausalLM.from_pretrained(home)
    for rank in (2, 4):
        client = loaded(model, tmp_path / f"start/rank-{rank}")
        torch.manual_seed(rank)
        with torch.no_grad():
            for name, parameter in client.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        save(client, tmp_path / f"clients/client-{rank}")

    report = aggregate([tmp_path / "clients"], tmp_path / "global")
    initialize(home, tmp_path / "again", [tmp_path / "clients"])

    assert report.rank == 8
    for rank in (2, 4):
        given = read(tmp_path / f"again/client-{rank}").modules
        theirs = read(tmp_path / f"clients/client-{rank}").modules
        assert given.keys() == theirs.keys()
        assert {n: (m.rank, m.scale) for n, m in given.items()} == {
            n: (m.rank, m.scale) for n, m in theirs.items()
        }
        first = shapes(tmp_path / f"start/rank-{rank}")
        assert shapes(tmp_path / f"again/client-{rank}") == first
        start = loaded(model, tmp_path / f"again/client-{rank}")
        assert layers(start) == layers(loaded(model, tmp_path / f"start/rank-{rank}"))


@pytest.mark.parametrize(
    ("build", "choice"),
    [
        newer(gpt_oss, EXPLICIT),
        newer(llama4, EXPLICIT),
        (mixtral, ALL),
        (whisper, {"target_modules": ("conv1", "k_proj")}),
        (siglip, {"target_modules": ("head.attention",)}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_like_clients_of_every_kind_of_layer(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel], choice: dict[str, Any]
) -> None:
    home = base(build)
    with muted():
        model = type(build()).from_pretrained(home)
    for name, rank in (("ann", 2), ("bob", 3)):
        save(wrap(copy.deepcopy(model), lora(r=rank, **choice)), tmp_path / "clients" / name)

    initialize(home, tmp_path / "out", [tmp_path / "clients"])

    for name in ("ann", "bob"):
        assert shapes(tmp_path / "out" / name) == shapes(tmp_path / "clients" / name)
        assert layers(loaded(model, tmp_path / "out" / name)) == layers(
            loaded(model, tmp_path / "clients" / name)
        )
    ann, bob = (read(tmp_path / "out" / name).modules for name in ("ann", "bob"))
    for module, one in ann.items():
        assert torch.equal(one.read().A, bob[module].read().A[: one.rank])


@NEWER_EXPERTS
@pytest.mark.parametrize(
    ("version", "found"), [("0.18.1", r"before 0\.19"), ("0.19.0", r"0\.19\.0")]
)
def test_clients_of_an_older_peft_have_other_experts(
    tmp_path: Path, base: Base, version: str, found: str
) -> None:
    home = base(gpt_oss)
    initialize(home, tmp_path / "start", options=InitOptions(ranks=(2,), **EXPLICIT))
    set_fields(tmp_path / "start/rank-2", {"peft_version": version})
    with pytest.raises(InputError, match=rf"PEFT {found} stored its experts"):
        initialize(home, tmp_path / "out", [tmp_path / "start"])


@pytest.mark.parametrize("version", ["0.18", "0.19.0"])
@pytest.mark.parametrize("build", [gpt_oss, llama4, qwen3_moe])
def test_experts_in_the_layout_of_an_older_peft_are_refused(build, version: str) -> None:
    """PEFT before 0.19 has no such attribute, and PEFT 0.19.0 sets it for the other models."""
    model = wrap(build(), lora(r=1, lora_alpha=1, **EXPLICIT))
    for layer in model.modules():
        swapped = vars(layer).pop("_did_swap_in_out_features", None)
        if swapped is not None and version == "0.19.0":
            transposed = getattr(layer.get_base_layer(), "is_transposed", False)
            vars(layer)["_did_swap_in_out_features"] = transposed
    with pytest.raises(
        UsageError, match=r"--target-parameters: .* upgrade PEFT to 0\.19\.1 or later"
    ):
        adapted_modules(model.get_base_model())


# What cannot be started is refused by its name.


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (mamba, {"target_modules": ("conv1d",)}, r"backbone\.layers\.0\.mixer\.conv1d cannot be"),
        (mamba, ALL, "--target-modules: .*'out_proj' is incompatible .* name some of embeddings, "),
        (llama, {"target_modules": ("q_proj", "norm")}, r"model\.norm cannot be adapted"),
        (vit, {"target_modules": ("q_proj", "intermediate")}, "no module is named intermediate"),
        by_name(mixtral, {"target_modules": ("q_proj", "w1")}, "w1 without also targeting w3"),
        (mixtral, {"target_modules": ("gate_proj",)}, "no module is named gate_proj; name some of"),
        (
            qwen3_moe,
            {"target_modules": ("q_proj", "typo", "up_proj", "gate_proj")},
            "is named typo",
        ),
        (gpt_oss, NAMES, "no module is named gate_proj; name some of embed_tokens, q_proj, k_proj"),
        (
            gpt_oss,
            {"target_modules": ("q_proj",), "target_parameters": ("experts.typo",)},
            r"--target-parameters: no parameter is named experts\.typo; name some of gate_up_proj,",
        ),
        (
            llama,
            {"target_modules": ("q_proj",), "target_parameters": ("typo",)},
            "no parameter is named typo; leave it out",
        ),
        newer(gpt_oss, EXPLICIT | {"dropout": 0.1}, "--dropout: given for a mixture of experts"),
    ],
)
def test_what_cannot_be_started_is_refused_by_name(
    tmp_path: Path, base: Base, build, options: dict[str, Any], message: str
) -> None:
    home = base(build)
    with pytest.raises(UsageError, match=message):
        initialize(home, tmp_path / "out", options=InitOptions(ranks=(2,), **options))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@EXPERTS_BY_NAME
def test_layers_that_peft_leaves_out_are_told(tmp_path: Path, base: Base) -> None:
    """It takes gate_proj for a parameter of experts in every layer, shared ones and dense ones."""
    report = initialize(base(glm4_moe), tmp_path / "out", options=InitOptions((2,), **NAMES))
    [warning] = report.warnings
    assert "does not adapt model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj," in warning
    assert warning.endswith("and 3 more")


@NEWER_EXPERTS
def test_the_command_adapts_parameters(tmp_path: Path, base: Base, monkeypatch) -> None:
    base(gpt_oss)
    monkeypatch.chdir(tmp_path)
    options = ["--target-modules", "q_proj", "--target-parameters", "gate_up_proj,down_proj"]

    result = run("base", "-o", "out", "--ranks", "2", *options)
    like = run("base", "-o", "like", "--like", "out", *options[2:])

    assert result.exit_code == 0, result.output
    assert "experts.gate_up_proj        8  48 x 16" in result.stdout
    assert config(tmp_path / "out/rank-2")["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert (like.exit_code, "given with --like" in like.stderr) == (2, True)


# What is written is read back before anybody sees it.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 3}, "rank-2: fedlora would not read it again: .* has rank 2, but .* gives it 3"),
        ({"target_modules": ["k_proj"]}, "would not read it again: .*target_modules does not"),
        ({"lora_alpha": 9}, r"would read another scaling of model\.layers\.0"),
        ({"use_rslora": True}, r"would read another scaling of model\.layers\.0"),
    ],
)
@pytest.mark.parametrize("command", ["init", "distribute"])
def test_what_its_own_reader_takes_otherwise_is_not_published(
    tmp_path: Path, base: Base, monkeypatch, command: str, fields: dict[str, Any], message: str
) -> None:
    home = base(llama)
    options = InitOptions(ranks=(2,), target_modules=("q_proj",))
    initialize(home, tmp_path / "start", options=options)
    real = distribution._check_readable

    def spoiled(folder: Path, one: Any) -> None:
        set_fields(folder, fields)
        real(folder, one)

    monkeypatch.setattr(distribution, "_check_readable", spoiled)
    again = {
        "init": partial(initialize, home, tmp_path / "out", options=options),
        "distribute": partial(
            distribute,
            tmp_path / "start/rank-2",
            tmp_path / "out",
            options=DistributeOptions(ranks=(2,)),
        ),
    }[command]
    with pytest.raises(VerificationError, match=message):
        again()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["q_proj", "k_proj"]},
            r"load this initial adapter differently: .*k_proj",
        ),
        ({"r": 3}, r"load this initial adapter differently: .*q_proj\.lora_A"),
        ({"target_modules": ["norm"]}, "rejects this initial adapter"),
    ],
)
def test_what_peft_loads_in_another_way_is_not_published(
    tmp_path: Path, base: Base, monkeypatch, fields: dict[str, Any], message: str
) -> None:
    home = base(llama)
    real = acceptance._check

    def spoiled(model: Any, base: str, folder: Path) -> None:
        set_fields(folder, fields)
        real(model, base, folder)

    monkeypatch.setattr(acceptance, "_check", spoiled)
    with pytest.raises(InputError, match=message):
        initialize(home, tmp_path / "out", options=InitOptions((2,), target_modules=("q_proj",)))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@EXPERTS_BY_NAME
def test_the_names_of_tensors_are_peft_s(tmp_path: Path, base: Base) -> None:
    """Of two parameters in one module, the first that the model defines is innermost."""
    initialize(base(mixtral), tmp_path / "out", options=InitOptions((2,), **ALL))
    written = shapes(tmp_path / "out/rank-2")
    experts = f"{PREFIX}model.layers.0.mlp.experts"
    assert written[f"{experts}.base_layer.lora_A.weight"] == (4 * 4, 16)
    assert written[f"{experts}.base_layer.lora_B.weight"] == (48, 4 * 4)
    assert written[f"{experts}.lora_A.weight"] == (4 * 2, 24)
    assert written[f"{experts}.lora_B.weight"] == (16, 4 * 2)
