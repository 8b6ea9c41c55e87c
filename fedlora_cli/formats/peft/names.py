"""The names that PEFT gives to files and tensors."""

from __future__ import annotations

from collections.abc import Container

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


def factor_of(key: str) -> tuple[str, Kind, str] | None:
    """The module, its kind, and "B" or "A", told by the key alone, never by a shape."""
    name = key.removeprefix(PREFIX)
    for kind, endings in ENDINGS.items():
        for side, ending in zip("BA", endings, strict=True):
            if name.endswith(ending):
                return name.removesuffix(ending), kind, side
    return None


def owner_of(name: str, saved: tuple[str, ...]) -> str | None:
    """The outermost module around a tensor whose name ends in one of `modules_to_save`."""
    parts = name.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((parent for parent in parents if parent.endswith(saved)), None)


def is_base_weight(name: str, adapted: Container[str]) -> bool:
    """Base weights that PEFT stores for adapted or resized embeddings."""
    module = name.removesuffix(".weight").removesuffix(".base_layer")
    if name == f"{module}.base_layer.weight":
        return module in adapted
    return name == f"{module}.weight" and module.split(".")[-1] in EMBEDDINGS


def meaning_of(name: str) -> str:
    """What a tensor that is none of these most likely is."""
    endings = {
        "lora_magnitude_vector": "DoRA",
        "lora_B.bias": "a bias on lora_B (lora_bias)",
        "token_adapter": "trainable tokens",
        "lora_diag": "KaSA",
        ".bias": "a trained bias (bias='all' or 'lora_only')",
        "lora_": "an adapter name in the key, or a LoRA variant",
    }
    return next((text for part, text in endings.items() if part in name), "not part of LoRA")
