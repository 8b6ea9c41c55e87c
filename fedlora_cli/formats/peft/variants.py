"""Kinds of LoRA whose tensors mean something else than scale · B A on an untouched base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora_cli.errors import InputError

#: Fields that change what the tensors mean in a way that is not understood yet, with their name.
NOT_UNDERSTOOD: dict[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "biases on lora_B (lora_bias)",
    "target_parameters": "LoRA on parameters, as for mixtures of experts (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
    "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}

#: Initialisations that leave the base weights as they were. The others move weight from the base
#: into the adapter (PiSSA, OLoRA, CorDA, LoftQ), or freeze a factor (MiCA).
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def variants_of(path: Path, raw: Mapping[str, Any]) -> Iterator[InputError]:
    """An error for every kind of LoRA that is not understood."""
    for name, meaning in NOT_UNDERSTOOD.items():
        if raw.get(name):
            cure = f"not understood yet; train without {name}"
            yield InputError(path, f"it uses {meaning}", cure)
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        found = f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base model"
        cure = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        yield InputError(path, found, cure)
    if raw.get("bias", "none") != "none":
        found = f"bias is {raw['bias']!r}"
        yield InputError(path, found, "not understood yet; train with 'none'")
