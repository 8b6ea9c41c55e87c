"""The names that PEFT gives to files and tensors, and those that others make of them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator

from fedlora_cli.adapters.adapter import Kind

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

#: Every file of an adapter folder that fedlora writes.
FILES = (CONFIG, WEIGHTS, "README.md", "fedlora.json")

#: Every key of a LoRA adapter begins with it: the wrapper, then the wrapped model.
PREFIX = "base_model.model."

#: The endings of the two factors of a module, B first. Embeddings have no `.weight`.
_LINEAR = (".lora_B.weight", ".lora_A.weight")
ENDINGS: dict[Kind, tuple[str, str]] = {
    "linear": _LINEAR,
    "embedding": (".lora_embedding_B", ".lora_embedding_A"),
    "convolution": _LINEAR,
    "experts": _LINEAR,
}

MAGNITUDE = ".lora_magnitude_vector"
LORA_BIAS = ".lora_B.bias"
TOKENS = ".token_adapter.trainable_tokens_delta"

#: The only embedding and output layer that PEFT knows by name.
OUTPUT = "lm_head"
EMBEDDINGS = ("embed_tokens", OUTPUT)

#: A name that PEFT may put into an expression of its own: it has no meaning there but itself.
PLAIN = re.compile(r"[A-Za-z0-9_.-]+")

#: PEFT adds these for every sequence or token classifier, whether the model has them or not.
ADDED_TO_MODULES_TO_SAVE = frozenset({"classifier", "score"})

#: The wrapper that a second LoRA, or PEFT's own layer, has put around a module.
_WRAPPED = ".base_layer"

#: The wrapper around an embedding of which PEFT trains some rows.
_WRAPPED_TOKENS = ".token_adapter.base_layer"

#: What frameworks put around a model or any part of it: torch.compile, FSDP (torch, fairscale),
#: and checkpoints of activations, which are the same wrapper as their offloading.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
#: What they put around a whole model: DDP, DeepSpeed, Megatron and averages of weights; Lightning
#: and Composer; Fabric; Opacus; TRL's models with a value head.
_WHOLE = ("module", "model", "_forward_module", "_module", "pretrained_model")
_INSIDE = re.compile(rf"(?<![^.])(?:{'|'.join(_ANYWHERE)})\.")
_AROUND = re.compile(rf"^(?:(?:{'|'.join(_WHOLE)})\.)+(?=base_model\.model\.)")

#: A head under the name of its adapter, beside which a whole model's state has the original.
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_ORIGINAL = ".original_module."
_TWICE = ".modules_to_save."

#: The name of the adapter that is left in a key of a whole model's state.
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.(?!weight$|bias$)[^.]+(\.weight|\.bias|)$"
)


def normalized(key: str) -> str:
    """The name that PEFT would have stored a tensor under.

    >>> normalized("module.base_model.model.layers.0.q_proj.lora_A.default.weight")
    'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    name = _AROUND.sub("", _INSIDE.sub("", key), count=1)
    name = _SAVED.sub("", _NAMED.sub(r".\1\2", name))
    return name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name


def is_redundant(name: str, names: Container[str]) -> bool:
    """Whether PEFT passes over it: the base model's own head beside the one that was trained, or
    the trained one under a second of these names. PEFT stores both of a resized embedding.
    """
    return _ORIGINAL in name or (_TWICE in name and name.replace(_TWICE, ".") in names)


def factor_of(key: str) -> tuple[str, Kind, str] | None:
    """The name of a pair, its kind, and "B" or "A", told by the key alone, never by a shape."""
    name = key.removeprefix(PREFIX)
    kinds: tuple[Kind, ...] = ("linear", "embedding")
    for kind in kinds:
        for side, ending in zip("BA", ENDINGS[kind], strict=True):
            if name.endswith(ending):
                return name.removesuffix(ending), kind, side
    return None


def target_of(pair: str) -> str:
    """The module that PEFT's config speaks of: what is nested in it was adapted with it.

    >>> target_of("attn.base_layer.out_proj"), target_of("mlp.experts.base_layer")
    ('attn', 'mlp.experts')
    """
    return pair.partition(_WRAPPED)[0]


def endings(name: str) -> Iterator[str]:
    """The name and what follows each of its dots.

    >>> list(endings("a.b.c"))
    ['a.b.c', 'b.c', 'c']
    """
    while name:
        yield name
        name = name.partition(".")[2]


def token_name(name: str, index: int) -> str:
    """The name of one row of trainable tokens."""
    return f"{name}[{index}]"


def token_of(name: str) -> tuple[str, int] | None:
    """The tensor and the token, where a name is that of one row of trainable tokens.

    >>> token_of(token_name("embed.token_adapter.trainable_tokens_delta", 7))
    ('embed.token_adapter.trainable_tokens_delta', 7)
    """
    stem, _, index = name.partition(f"{TOKENS}[")
    return (stem + TOKENS, int(index.removesuffix("]"))) if index else None


def owner_of(name: str, saved: tuple[str, ...]) -> str | None:
    """The outermost module around a tensor whose name ends in one of `modules_to_save`."""
    found = ((name.find(f"{one}."), len(one)) for one in saved)
    ends = [start + length for start, length in found if start >= 0]
    return name[: min(ends)] if ends else None


def unwrapped(name: str) -> str:
    """The base model's own name of one of its tensors, which PEFT may store under a wrapper.

    >>> unwrapped("lm_head.base_layer.bias"), unwrapped("wte.token_adapter.base_layer.weight")
    ('lm_head.bias', 'wte.weight')
    """
    module, _, leaf = name.rpartition(".")
    for wrapper in (_WRAPPED_TOKENS, _WRAPPED):
        if module.endswith(wrapper):
            return f"{module.removesuffix(wrapper)}.{leaf}"
    return name


def wrapped(name: str, pairs: Container[str], tokens: Container[str]) -> str:
    """The name under which PEFT loads a tensor of the base model where it adapts the modules
    `pairs` and trains rows of the embeddings `tokens`.

    >>> wrapped("lm_head.weight", {"lm_head"}, ()), wrapped("wte.weight", (), {"wte"})
    ('lm_head.base_layer.weight', 'wte.token_adapter.base_layer.weight')
    """
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        for wrapper, modules in ((_WRAPPED, pairs), (_WRAPPED_TOKENS, tokens)):
            if module in modules:
                return f"{module}{wrapper}.{leaf}"
    return name


def is_bias(name: str, bias: str, adapted: Container[str]) -> bool:
    """Whether `bias`, the field of the config, makes PEFT train and store a tensor of this name."""
    if bias == "lora_only":
        return name.endswith(f"{_WRAPPED}.bias") and target_of(name) in adapted
    return bias == "all" and name.split(".")[-1] == "bias"


def meaning_of(name: str) -> str:
    """What a tensor that is none of these most likely is."""
    endings = {
        "lora_magnitude_vector": "DoRA, which use_dora does not say",
        "lora_B.bias": "a bias on lora_B, which lora_bias does not say",
        "token_adapter": "trainable tokens, which trainable_token_indices does not say",
        "lora_diag": "KaSA",
        ".bias": "a trained bias, which bias does not say",
        "lora_": "a LoRA variant",
    }
    return next((text for part, text in endings.items() if part in name), "not part of LoRA")


def shortened_keys(keys: Iterable[str]) -> str:
    """One key of those that were normalised, and how many more there are."""
    first, *rest = sorted(keys)
    return f"{first} and {len(rest)} more" if rest else first
