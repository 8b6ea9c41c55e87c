"""Fused experts of tiny models, in the layouts of several versions of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from support.adapters import config
from support.peft_layers import applied, load, train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = 4
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def qwen(width: int = 24) -> nn.Module:
    """At width 8 one of the two parameters is square, at 16 the other one."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
        )
    )


def gpt_oss() -> nn.Module:
    """Its experts are (in, out), which PEFT before 0.19 stores as PEFT since 0.19.1 does."""
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
        )
    )


def exchanged(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of the transposed update of every expert: A' = Bᵀ and B' = Aᵀ."""
    rows = A.reshape(EXPERTS, -1, A.shape[1])
    columns = B.reshape(B.shape[0], -1, EXPERTS)
    return columns.permute(2, 1, 0).flatten(0, 1), rows.permute(2, 1, 0).flatten(1)


def as_before(folder: Path, version: str | None = "0.18.1", *, exchange: bool = True) -> None:
    """The adapter as an earlier PEFT would have stored it."""
    tensors = load_file(folder / WEIGHTS)
    pairs = [key for key in tensors if "experts" in key and key.endswith("lora_A.weight")]
    for key in pairs if exchange else []:
        other = key.replace("lora_A", "lora_B")
        A, B = exchanged(tensors[key], tensors[other])
        tensors[key], tensors[other] = A.contiguous(), B.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    fields = config(folder) | {"peft_version": version}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def trained(base: nn.Module, root: Path, names: str) -> dict[str, dict[str, Tensor]]:
    return {
        name: applied(
            train(
                base,
                root / name,
                k,
                r=2 * (k + 1),
                lora_alpha=3,
                target_modules=["q_proj"],
                target_parameters=PARAMETERS,
            )
        )
        for k, name in enumerate(names)
    }


def assert_mean(base: nn.Module, folder: Path, own: dict[str, dict[str, Tensor]]) -> None:
    found = applied(load(base, folder))
    for key, value in found.items():
        mean = sum(one[key] for one in own.values()) / len(own)
        assert float((value - mean).norm()) <= 1e-5 * float(mean.norm()), key


def square(tmp_path: Path, names: str) -> Path:
    """One pair of experts, 16 x 16 in all clients."""
    for k, name in enumerate(names):
        train(
            qwen(16),
            tmp_path / name,
            k,
            r=2,
            target_modules=["q_proj"],
            target_parameters=["experts.down_proj"],
        )
    return tmp_path
