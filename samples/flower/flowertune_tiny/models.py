"""A Llama of 30 000 weights with a LoRA adapter, and its training."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from flowertune_tiny.dataset import VOCABULARY


def cosine_annealing(current: int, total: int, highest: float, lowest: float) -> float:
    """The learning rate of a round."""
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * current / total))


def get_model(cfg: Mapping[str, Any]) -> Any:
    """The base model, the same everywhere, with an adapter of the rank in the config."""
    torch.manual_seed(cfg["model.seed"])
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,  # large enough for an adapter to move the letters
        )
    )
    peft_config = LoraConfig(
        r=cfg["model.lora.peft-lora-r"],
        lora_alpha=cfg["model.lora.peft-lora-alpha"],
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, peft_config)


def loss_of(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """The mean loss of a token."""
    loss: torch.Tensor = model(input_ids=texts, labels=texts).loss
    return loss


def fit(model: Any, texts: torch.Tensor, epochs: int, learning_rate: float) -> float:
    """Train the adapter in batches of 8, and return the mean loss."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate)
    losses = []
    model.train()
    for _ in range(epochs):
        for batch in torch.split(texts, 8):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)
