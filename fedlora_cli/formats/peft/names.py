"""The names of files and tensors in PEFT, and their variants by other tools."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from fedlora_cli.adapters.adapter import BASE_LAYER, Kind

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

#: The beginning of every key of a LoRA adapter: PEFT's wrapper, then the wrapped model.
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

#: The only output layer and embedding that PEFT knows by name.
OUTPUT = "lm_head"
EMBEDDINGS = ("embed_tokens", OUTPUT)

#: A name without special characters, which PEFT may put into an expression unescaped.
PLAIN = re.compile(r"[A-Za-z0-9_.-]+")

#: PEFT adds these for every sequence or token classifier, even if the model does not have them.
ADDED_TO_MODULES_TO_SAVE = frozenset({"classifier", "score"})

#: The name of the original embedding inside PEFT's layer for trained tokens.
_TOKEN_BASE_LAYER = f".token_adapter{BASE_LAYER}"

#: Wrappers around a model or any part of it: torch.compile, FSDP (torch, fairscale), and
#: checkpointing or offloading of activations.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
#: Wrappers around a whole model: DDP, DeepSpeed, Megatron and averages of weights; Lightning and
#: Composer; Fabric; Opacus; TRL's models with a value head.
_WHOLE = ("module", "model", "_forward_module", "_module", "pretrained_model")
_INSIDE = re.compile(rf"(?<![^.])(?:{'|'.join(_ANYWHERE)})\.")
_AROUND = re.compile(rf"^(?:(?:{'|'.join(_WHOLE)})\.)+(?=base_model\.model\.)")

#: A head with the adapter's name in its key. The state of a whole model has the original, too.
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_ORIGINAL = ".original_module."
_TWICE = ".modules_to_save."

#: The adapter's name in the keys of a whole model's state.
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.(?!weight$|bias$)[^.]+(\.weight|\.bias|)$"
)


def normalized(key: str) -> str:
    """The name under which PEFT stores the tensor, without wrappers and the adapter's name.

    >>> normalized("module.base_model.model.layers.0.q_proj.lora_A.default.weight")
    'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    name = _AROUND.sub("", _INSIDE.sub("", key), count=1)
    name = _SAVED.sub("", _NAMED.sub(r".\1\2", name))
    return name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name


def is_redundant(name: str, names: Container[str]) -> bool:
    """Whether PEFT ignores the tensor: the original of a trained head, or the trained head under a
    second name among `names`. PEFT stores both tensors of a resized embedding.
    """
    return _ORIGINAL in name or (_TWICE in name and name.replace(_TWICE, ".") in names)


def factor_of(key: str) -> tuple[str, Kind, str] | None:
    """The name of the pair, its kind, and "B" or "A"; None if the key is not that of a factor."""
    name = key.removeprefix(PREFIX)
    kinds: tuple[Kind, ...] = ("linear", "embedding")
    for kind in kinds:
        for side, ending in zip("BA", ENDINGS[kind], strict=True):
            if name.endswith(ending):
                return name.removesuffix(ending), kind, side
    return None


def target_of(pair: str) -> str:
    """The module that PEFT's config names for this pair, which may be nested in the module.

    >>> target_of("attn.base_layer.out_proj"), target_of("mlp.experts.base_layer")
    ('attn', 'mlp.experts')
    """
    return pair.partition(BASE_LAYER)[0]


def is_embedding(module: str) -> bool:
    """Whether PEFT knows the module by its last name as an embedding or output layer."""
    return module.rpartition(".")[2] in EMBEDDINGS


def endings(name: str) -> Iterator[str]:
    """The name, and the rest of the name after each dot.

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
    """The tensor and the token of a name by `token_name`; None for other names.

    >>> token_of(token_name("embed.token_adapter.trainable_tokens_delta", 7))
    ('embed.token_adapter.trainable_tokens_delta', 7)
    """
    stem, _, index = name.partition(f"{TOKENS}[")
    return (stem + TOKENS, int(index.removesuffix("]"))) if index else None


def owner_of(name: str, saved: tuple[str, ...]) -> str | None:
    """The outermost module around a tensor whose name ends in one of the names `saved`."""
    starts = ((name.find(f"{module}."), len(module)) for module in saved)
    ends = [start + length for start, length in starts if start >= 0]
    return name[: min(ends)] if ends else None


def unwrapped(name: str) -> str:
    """The name of a tensor in the base model, without PEFT's wrappers.

    >>> unwrapped("lm_head.base_layer.bias"), unwrapped("wte.token_adapter.base_layer.weight")
    ('lm_head.bias', 'wte.weight')
    """
    module, _, leaf = name.rpartition(".")
    for wrapper in (_TOKEN_BASE_LAYER, BASE_LAYER):
        if module.endswith(wrapper):
            return f"{module.removesuffix(wrapper)}.{leaf}"
    return name


def wrapped(name: str, pairs: Container[str], tokens: Container[str]) -> str:
    """The name under which PEFT loads a tensor of the base model, if it adapts the modules `pairs`
    and trains rows of the embeddings `tokens`.

    >>> wrapped("lm_head.weight", {"lm_head"}, ()), wrapped("wte.weight", (), {"wte"})
    ('lm_head.base_layer.weight', 'wte.token_adapter.base_layer.weight')
    """
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        for wrapper, modules in ((BASE_LAYER, pairs), (_TOKEN_BASE_LAYER, tokens)):
            if module in modules:
                return f"{module}{wrapper}.{leaf}"
    return name


def is_bias(name: str, bias: str, adapted: Container[str]) -> bool:
    """Whether PEFT trains and stores a tensor with this name under this `bias` of the config."""
    if bias == "lora_only":
        return name.endswith(f"{BASE_LAYER}.bias") and target_of(name) in adapted
    return bias == "all" and name.split(".")[-1] == "bias"


def meaning_of(name: str) -> str:
    """The most likely meaning of a tensor that the config does not explain."""
    meanings = {
        "lora_magnitude_vector": "DoRA, but use_dora is not set",
        "lora_B.bias": "a bias on lora_B, but lora_bias is not set",
        "token_adapter": "trainable tokens, but trainable_token_indices does not name them",
        "lora_diag": "KaSA",
        ".bias": "a trained bias, but bias does not allow it",
        "lora_": "a LoRA variant",
    }
    return next((text for part, text in meanings.items() if part in name), "not part of LoRA")
