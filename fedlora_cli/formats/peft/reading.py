"""A PEFT folder to an `Adapter`: headers and config now, tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

from fedlora_cli.adapter import Adapter, FullTensor, Kind, Module, widest
from fedlora_cli.errors import InputError
from fedlora_cli.factors import Factors
from fedlora_cli.files.documents import exists
from fedlora_cli.files.safetensors import Entry, read_header
from fedlora_cli.formats.peft.config import Config, read_config
from fedlora_cli.formats.peft.names import (
    ADDED_TO_MODULES_TO_SAVE,
    CONFIG,
    EMBEDDINGS,
    ENDINGS,
    PICKLE,
    PREFIX,
    WEIGHTS,
)


def recognises(folder: Path) -> bool:
    """Whether the folder holds any file of a PEFT adapter."""
    return any(exists(folder / name) for name in (CONFIG, WEIGHTS, PICKLE))


def read(folder: Path) -> Adapter:
    """The adapter in `folder`. The tensors tell what is adapted; the config must agree with them.

    Raises InputError for anything damaged, contradictory, or not understood.
    """
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    if not exists(weights) and exists(pickle):
        cure = "load it where it was trained and save_pretrained(safe_serialization=True)"
        raise InputError(pickle, "a pickle, which is never opened", cure)
    config, unknown = read_config(folder / CONFIG)
    entries = read_header(weights)

    pairs: dict[str, dict[str, Entry]] = {}
    kinds: dict[str, Kind] = {}
    others: dict[str, Entry] = {}
    for key, entry in entries.items():
        if not key.startswith(PREFIX):
            raise InputError(weights, f"a tensor named {key}", f"PEFT's names begin with {PREFIX}")
        factor = _factor_of(key)
        if factor is None:
            others[key.removeprefix(PREFIX)] = entry
        else:
            module, kind, side = factor
            if kinds.setdefault(module, kind) != kind:
                raise InputError(weights, f"{module} has two kinds of factors", "save it again")
            pairs.setdefault(module, {})[side] = entry
    if not pairs:
        raise InputError(weights, "no LoRA tensors in it", "save the adapter, not the base model")

    # Before the factors: a tensor of another kind explains why a factor is missing.
    tensors = _full_tensors(weights, others, kinds, config)
    notes = []
    if unknown:
        notes.append(f"{folder.name}/{CONFIG}: unknown fields ignored: {', '.join(unknown)[:200]}")
    absent = set(config.targets.saved) - ADDED_TO_MODULES_TO_SAVE
    if absent and all(tensor.owner is None for tensor in tensors.values()):
        heads = ", ".join(sorted(absent))[:200]
        notes.append(f"{folder.name}: modules_to_save names {heads}, but has no tensor of them")
    if exists(pickle):
        notes.append(f"{folder.name}/{PICKLE}: ignored, as PEFT does; {WEIGHTS} counts")
    return Adapter(
        path=folder,
        weights_file=weights,
        modules={
            name: _module(weights, name, kinds[name], pairs[name], config) for name in sorted(pairs)
        },
        tensors=tensors,
        facts=config.facts,
        notes=tuple(notes),
    )


def _factor_of(key: str) -> tuple[str, Kind, str] | None:
    """The module, its kind, and "B" or "A", told by the key alone, never by a shape."""
    name = key.removeprefix(PREFIX)
    for kind, endings in ENDINGS.items():
        for side, ending in zip("BA", endings, strict=True):
            if name.endswith(ending):
                return name.removesuffix(ending), kind, side
    return None


def _module(
    weights: Path, name: str, kind: Kind, pair: Mapping[str, Entry], config: Config
) -> Module:
    """One adapted module, its two factors and the config in agreement."""
    if not name:
        raise InputError(weights, "factors of a module without a name", "save it again")
    if ".base_layer" in f".{name}":
        _not_understood(weights, name, "nested LoRA (mixtures of experts, multi-head attention)")
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            found = f"{name} has lora_{other} but no lora_{side}"
            raise InputError(weights, found, "save the adapter again, whole")
    B, A = pair["B"], pair["A"]
    for entry in (B, A):
        _check_factor(weights, entry)
    rank = A.shape[0]
    if B.shape[1] != rank:
        found = f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)} differ in rank"
        raise InputError(weights, found, "A is (rank, in), B is (out, rank)")
    if config.rank(name) != rank:
        found = f"{name} has rank {rank}, but {config.path.name} says {config.rank(name)}"
        raise InputError(weights, found, "correct r or rank_pattern; the tensors are the truth")
    if not config.targets.match(name):
        found = f"{name} has LoRA tensors, but target_modules does not match it"
        raise InputError(weights, found, "correct target_modules; PEFT would ignore the tensors")
    scale = config.scale(name, rank)
    return Module(
        shape=(B.shape[0], A.shape[1]),
        rank=rank,
        scale=scale,
        dtype=widest([B.dtype, A.dtype]),
        kind=kind,
        read=partial(_read_factors, B, A, scale),
    )


def _check_factor(weights: Path, entry: Entry) -> None:
    if not entry.is_float:
        found = f"{entry.key} has dtype {entry.dtype}"
        raise InputError(weights, found, "save it as float32, float16 or bfloat16")
    if len(entry.shape) > 2:
        _not_understood(weights, entry.key, "LoRA on a convolution")
    if len(entry.shape) < 2:
        found = f"{entry.key} has shape {list(entry.shape)}"
        cure = "gather the shards (ZeRO-3, FSDP) before save_pretrained"
        raise InputError(weights, found, cure)


def _read_factors(B: Entry, A: Entry, scale: float) -> Factors:
    return Factors(B.read(), A.read(), scale)


def _full_tensors(
    weights: Path, others: Mapping[str, Entry], kinds: Mapping[str, Kind], config: Config
) -> dict[str, FullTensor]:
    """What is not a factor: trained heads, base embeddings; anything else is refused by name."""
    saved = config.targets.saved
    result = {}
    for name, entry in others.items():
        owner = _owner(name, saved)
        if owner is None and not _is_base_weight(name, kinds):
            _not_understood(weights, name, _meaning(name))
        result[name] = FullTensor(entry.shape, entry.dtype, owner, entry.read)
    return result


def _owner(name: str, saved: tuple[str, ...]) -> str | None:
    """The outermost module around a tensor whose name ends in one of `modules_to_save`."""
    parts = name.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((parent for parent in parents if parent.endswith(saved)), None)


def _is_base_weight(name: str, kinds: Mapping[str, Kind]) -> bool:
    """Base weights that PEFT stores for adapted or resized embeddings."""
    module = name.removesuffix(".weight").removesuffix(".base_layer")
    if name == f"{module}.base_layer.weight":
        return module in kinds
    return name == f"{module}.weight" and module.split(".")[-1] in EMBEDDINGS


def _meaning(name: str) -> str:
    """What a tensor of that name most likely is."""
    endings = {
        "lora_magnitude_vector": "DoRA",
        "lora_B.bias": "a bias on lora_B (lora_bias)",
        "token_adapter": "trainable tokens",
        "lora_diag": "KaSA",
        ".bias": "a trained bias (bias='all' or 'lora_only')",
        "lora_": "an adapter name in the key, or a LoRA variant",
    }
    return next((text for part, text in endings.items() if part in name), "not part of LoRA")


def _not_understood(weights: Path, name: str, meaning: str) -> NoReturn:
    raise InputError(weights, f"{name}: {meaning}", "not understood yet; train plain LoRA")
