"""Tiny models and adapters of them, trained, loaded and applied by PEFT."""

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
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 30,
}


def llama() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


def quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What PEFT has to say of rare layers is not our subject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def train(base: nn.Module, folder: Path, seed: int, **config: Any) -> PeftModel:
    """An adapter that PEFT makes and saves; a step of random noise stands for training."""
    torch.manual_seed(seed)
    model = quietly(get_peft_model, copy.deepcopy(base), LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    quietly(model.save_pretrained, str(folder))
    if config.get("bias") == "lora_only":
        saved = load_file(folder / "adapter_model.safetensors")
        if not any(key.endswith(".bias") for key in saved):
            pytest.skip("this version of PEFT forgets to save these biases")
    return model


def load(base: nn.Module, folder: Path) -> PeftModel:
    """With every warning an error, so that no tensor can be ignored or missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # PEFT 0.21 looks for parameters among the modules when it says this.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", "Unsupported layer type .*(Experts|TopKRouter)")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder))


def applied(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter adds to a model or puts into it, as PEFT computes it, in float64."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double()
            bias = module.lora_B["default"].bias
            if bias is not None:
                found[f"{name} bias"] = module.scaling["default"] * bias.detach().double()
        if hasattr(module, "trainable_tokens_delta"):
            rows = module.trainable_tokens_delta["default"].detach().double()
            for index, row in zip(module.token_indices["default"], rows, strict=True):
                found[f"{name} token {index}"] = row
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and "lora_" not in name:
            found[name] = parameter.detach().double()
    return found
