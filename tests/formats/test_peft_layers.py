"""Every kind of layer and tensor that PEFT's LoRA writes, judged by what PEFT itself applies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.peft_layers import applied, llama, load, mixtral, train
from torch import Tensor, nn

from fedlora_cli import AggregateOptions, DistributeOptions, InputError, aggregate, distribute


class Convolutions(nn.Module):
    """One convolution of every dimension, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 5, 2)
        self.two = nn.Conv2d(4, 6, (3, 2))
        self.three = nn.Conv3d(2, 3, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        nn.init.normal_(self.mha.out_proj.bias)
        self.head = nn.Linear(8, 3)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    ranks: tuple[int, ...] = (2, 5, 3)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES = {
    "convolutions": Case(Convolutions, {"target_modules": ["one", "two", "three"]}),
    "multi-head attention": Case(Attention, {"target_modules": ["mha", "head"]}),
    "experts": Case(mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts alone": Case(mixtral, {"target_modules": [], "target_parameters": EXPERTS[:1]}),
    "experts of two ranks": Case(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"down_proj": 4},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "bias on lora_B": Case(llama, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "all biases": Case(llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of adapted layers": Case(llama, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "trainable tokens": Case(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2, 11]}
    ),
    "trainable tokens by name": Case(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 3]}}
    ),
    "activated LoRA": Case(
        llama,
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    ),
    "layer replication": Case(
        llama, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}
    ),
    "rsLoRA": Case(llama, {"target_modules": ["q_proj"], "use_rslora": True}),
}


def cohort(case: Case, base: nn.Module, root: Path) -> tuple[list[PeftModel], list[float]]:
    models, samples = [], [10.0 * (k + 1) for k in range(len(case.ranks))]
    for k, rank in enumerate(case.ranks):
        folder = root / "round" / f"client-{k}"
        models.append(train(base, folder, k, r=rank, lora_alpha=3 + k, **case.config))
        (folder / "fedlora.json").write_text(json.dumps({"samples": samples[k]}))
    return models, samples


@pytest.mark.parametrize("name", CASES)
def test_peft_applies_the_mean_of_what_it_applied_for_the_clients(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    torch.manual_seed(99)
    base = case.build()
    models, samples = cohort(case, base, tmp_path)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flora", verify=True))

    found = applied(load(base, tmp_path / "out"))
    own = [applied(model) for model in models]
    assert set(found) == set(own[0])
    for key, value in found.items():
        mean = sum(n / sum(samples) * one[key] for n, one in zip(samples, own, strict=True))
        assert float((value - mean).norm() / mean.norm()) < 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_it_is_handed_out_again_at_the_ranks_of_the_clients(tmp_path: Path, name: str) -> None:
    """One client gets back what it gave: its own rank is enough for it."""
    case = CASES[name]
    base = case.build()
    model = train(base, tmp_path / "round/one", 1, r=case.ranks[0], **case.config)
    aggregate([tmp_path / "round"], tmp_path / "out")

    distribute(tmp_path / "out", tmp_path / "next", tmp_path / "round", DistributeOptions())

    own, handed = applied(model), applied(load(base, tmp_path / "next/one"))
    assert set(own) == set(handed)
    for key, value in own.items():
        assert float((handed[key] - value).norm() / value.norm()) < 1e-5, key


def test_clients_may_have_trained_different_tokens(tmp_path: Path) -> None:
    base = llama()
    own = [
        applied(
            train(
                base,
                tmp_path / f"round/{k}",
                k,
                r=2,
                target_modules=["q_proj"],
                trainable_token_indices=tokens,
            )
        )
        for k, tokens in enumerate([[3, 9], [9, 4]])
    ]

    aggregate([tmp_path / "round"], tmp_path / "out")

    found = applied(load(base, tmp_path / "out"))
    rows = {key.rpartition(" ")[2]: key for key in found if " token " in key}
    assert sorted(rows) == ["3", "4", "9"]
    torch.testing.assert_close(found[rows["3"]], own[0][rows["3"]])
    torch.testing.assert_close(found[rows["4"]], own[1][rows["4"]])
    mean = (own[0][rows["9"]] + own[1][rows["9"]]) / 2
    torch.testing.assert_close(found[rows["9"]], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"bias": "all"}, {}, "its bias is none, but all in"),
        ({"lora_bias": True}, {}, "its lora bias is false, but true in"),
        ({"bias": "lora_only"}, {"bias": "lora_only", "target_modules": ["k_proj"]}, "no model."),
        ({"layer_replication": [[0, 2], [0, 1]]}, {}, "its layer replication is none, but"),
        ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, {}, "invocation tokens"),
        ({"use_dora": True}, {}, "its dora is false, but true in"),
    ],
    ids=str,
)
def test_what_clients_must_agree_on_is_named_where_they_differ(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], named: str
) -> None:
    base = llama()
    for k, config in enumerate((one, other)):
        train(base, tmp_path / f"round/{k}", k, **({"r": 2, "target_modules": ["q_proj"]} | config))

    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        aggregate([tmp_path / "round"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_two_versions_of_transformers_are_told_apart(tmp_path: Path) -> None:
    """Version 4 has a module for each expert, version 5 one parameter for all."""
    from support.adapters import Spec, make

    train(mixtral(), tmp_path / "round/new", 0, r=2, target_modules=[], target_parameters=EXPERTS)
    shapes = {f"model.layers.0.mlp.experts.{e}.w1": (24, 16) for e in range(3)}
    config = {"base_model_name_or_path": None}
    make(tmp_path / "round", Spec("old", rank=2, shapes=shapes, samples=None, config=config))

    with pytest.raises(
        InputError, match=r"is one expert, but all of .* are together in .* transformers, 4 or 5"
    ):
        aggregate([tmp_path / "round"], tmp_path / "out")


def test_a_convolution_with_groups_is_refused_by_name(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    train(base, tmp_path / "round/one", 0, r=2, target_modules=["0"])

    with pytest.raises(InputError, match=r"differ in rank; .* convolutions with groups in full"):
        aggregate([tmp_path / "round"], tmp_path / "out")


def test_dora_is_approximated_when_asked_for(tmp_path: Path) -> None:
    """Directions and magnitudes are averaged apart, and PEFT finds both."""
    base = llama()
    case = Case(llama, {"target_modules": ["q_proj"], "use_dora": True})
    models, samples = cohort(case, base, tmp_path)

    with pytest.raises(InputError, match="give --dora approximate"):
        aggregate([tmp_path / "round"], tmp_path / "out")
    options = AggregateOptions(method="flora", dora="approximate", verify=True)
    report = aggregate([tmp_path / "round"], tmp_path / "out", options)

    assert any("averaged apart" in warning for warning in report.warnings)
    found, own = factors(load(base, tmp_path / "out")), [factors(model) for model in models]
    assert any("magnitude" in key for key in found)
    for key, value in found.items():
        mean = sum(n / sum(samples) * one[key] for n, one in zip(samples, own, strict=True))
        assert float((value - mean).norm() / mean.norm()) < 1e-5, key


def factors(model: PeftModel) -> dict[str, Tensor]:
    """B A of every layer and its magnitudes, which PEFT's own difference would mix."""
    result = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_magnitude_vector") and "default" in module.lora_magnitude_vector:
            B, A = module.lora_B["default"].weight, module.lora_A["default"].weight
            result[name] = module.scaling["default"] * (B.double() @ A.double()).detach()
            magnitude = module.lora_magnitude_vector["default"].weight
            result[f"{name} magnitude"] = magnitude.detach().double()
    return result


@pytest.mark.parametrize(
    ("around", "inside"),
    [
        ("module.", "_fsdp_wrapped_module."),
        ("model.", "_checkpoint_wrapped_module."),
        ("_orig_mod.", "_orig_mod."),
        ("module._orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("_orig_mod.module.module.", "_fsdp_wrapped_module._fpw_module."),
        ("_forward_module.", ""),
        ("_module.", ""),
        ("pretrained_model.", ""),
    ],
)
@pytest.mark.parametrize("named", ["default", "local"])
def test_names_of_other_tools_are_read_as_peft_writes_them(
    tmp_path: Path, around: str, inside: str, named: str
) -> None:
    from safetensors.torch import save_file

    from fedlora_cli.formats import read as read_adapter

    train(llama(), tmp_path / "one", 0, r=2, target_modules=["q_proj", "embed_tokens"])
    path = tmp_path / "one/adapter_model.safetensors"
    plain = {name: one.read() for name, one in read_adapter(tmp_path / "one").modules.items()}
    tensors = load_file(path)
    foreign = {}
    for key, tensor in tensors.items():
        stem, side, rest = key.rpartition("lora_A") if "lora_A" in key else key.rpartition("lora_B")
        name = f"{stem}{side}.{named}{rest}" if side else key
        name = name.replace("lora_embedding_A", f"lora_embedding_A.{named}")
        name = name.replace("lora_embedding_B", f"lora_embedding_B.{named}")
        foreign[around + name.replace(".self_attn.", f".{inside}self_attn.")] = tensor
    save_file(foreign, path)

    read = read_adapter(tmp_path / "one")

    assert list(read.modules) == list(plain)
    assert "tensor names read as PEFT writes them" in " ".join(read.notes)
    for name, module in read.modules.items():
        assert torch.equal(module.read().A, plain[name].A)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    train(llama(), tmp_path / "one", 0, r=2, target_modules=["q_proj"])
    path = tmp_path / "one/adapter_model.safetensors"
    tensors = load_file(path)
    others = {
        key.replace(".weight", ".other.weight"): 2 * tensor for key, tensor in tensors.items()
    }
    save_file(tensors | others, path)

    with pytest.raises(
        InputError, match=r"another tensor has the name .*, too; save one adapter in one file"
    ):
        aggregate([tmp_path / "one"], tmp_path / "out")
