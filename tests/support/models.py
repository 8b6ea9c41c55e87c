"""Tiny models of the common architectures, and adapters of them by PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> PreTrainedModel:
    """Four layers: PEFT rewrites lists of twenty target modules and more."""
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_key_value_heads": 1, "vocab_size": 61}
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 4}), **sizes))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    )


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 70}
    return BertForSequenceClassification(BertConfig(**SIZES, **sizes, num_labels=3))


def vit() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "image_size": 8, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(**SIZES, **sizes, num_labels=5))


@dataclass(frozen=True)
class Case:
    """A model, and the configs of its clients."""

    build: Callable[[], PreTrainedModel]
    clients: tuple[dict[str, Any], ...]


CASES = {
    "llama": Case(
        llama,
        (
            {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
            {"r": 7, "lora_alpha": 5, "target_modules": r".*\.(q_proj|down_proj)"},
            {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
            {
                "r": 4,
                "target_modules": ["q_proj", "k_proj", "v_proj"],
                "rank_pattern": {"k_proj": 6, r".*layers\.0\.self_attn\.q_proj": 9},
                "alpha_pattern": {"layers.1.self_attn.v_proj": 31},
                "init_lora_weights": "gaussian",
            },
            {"r": 5, "target_modules": ["embed_tokens", "q_proj"]},
            {"r": 2, "target_modules": ["up_proj"], "layers_to_transform": [1]},
        ),
    ),
    "gpt2": Case(
        gpt2,
        (
            {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"r": 5, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
            {
                "r": 3,
                "target_modules": ["attn.c_attn", "mlp.c_fc"],
                "fan_in_fan_out": True,
                "exclude_modules": r".*\.h\.0\.mlp.*",
            },
        ),
    ),
    "bert": Case(
        bert,
        (
            {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
            {"r": 8, "lora_alpha": 3, "target_modules": ["query"], "task_type": "SEQ_CLS"},
            {"r": 3, "target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"},
        ),
    ),
    "vit": Case(
        vit,
        (
            {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
            {"r": 6, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        ),
    ),
}


@dataclass(frozen=True)
class Trained:
    """A client as PEFT holds it: factors by module, and its heads."""

    folder: Path
    samples: int
    factors: dict[str, tuple[np.ndarray, np.ndarray, float]]
    heads: dict[str, torch.Tensor]


def adapted(model: PeftModel) -> dict[str, Any]:
    """Every LoRA layer of a model, by the name of its module."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }


def factors_of(layer: Any) -> tuple[np.ndarray, np.ndarray, float]:
    if "default" in layer.lora_A:
        pair = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    else:
        pair = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
    B, A = (factor.detach().double().numpy() for factor in pair)
    return B, A, float(layer.scaling["default"])


def delta_of(layer: Any) -> np.ndarray:
    """What PEFT adds to the base weight, brought back to (out, in)."""
    delta = layer.get_delta_weight("default").detach().double().numpy()
    is_embedding = "default" not in layer.lora_A
    return delta.T if is_embedding or layer.fan_in_fan_out else delta


def wrap(model: torch.nn.Module, config: PeftConfig) -> PeftModel:
    """What PEFT has to say of rare layers and options is not our subject; nor is it in `save`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def save(model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))


def train(case: Case, base: PreTrainedModel, root: Path) -> list[Trained]:
    """Real adapters: PEFT makes and saves them, a step of random noise stands for training."""
    clients = []
    for number, config in enumerate(case.clients):
        torch.manual_seed(number)
        model = wrap(copy.deepcopy(base), LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = root / "round" / f"client-{number}"
        save(model, folder)
        samples = 10 * (number + 1)
        (folder / "fedlora.json").write_text(json.dumps({"samples": samples}))
        clients.append(
            Trained(
                folder,
                samples,
                {name: factors_of(layer) for name, layer in adapted(model).items()},
                {k: v.clone() for k, v in model.state_dict().items() if "modules_to_save" in k},
            )
        )
    return clients
