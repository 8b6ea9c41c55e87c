"""The names that PEFT gives to files and tensors."""

from __future__ import annotations

from fedlora_cli.adapter import Kind

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

#: Every file of an adapter folder that fedlora writes.
FILES = (CONFIG, WEIGHTS, "README.md", "fedlora.json")

#: Every key of a LoRA adapter begins with it: the wrapper, then the wrapped model.
PREFIX = "base_model.model."

#: The endings of the two factors of a module, B first. Embeddings have no `.weight`.
ENDINGS: dict[Kind, tuple[str, str]] = {
    "linear": (".lora_B.weight", ".lora_A.weight"),
    "embedding": (".lora_embedding_B", ".lora_embedding_A"),
}

#: PEFT stores the base weights of these when they are adapted, or when the vocabulary was resized.
EMBEDDINGS = ("embed_tokens", "lm_head")

#: PEFT adds these for every sequence or token classifier, whether the model has them or not.
ADDED_TO_MODULES_TO_SAVE = frozenset({"classifier", "score"})
