"""A PEFT folder to an `Adapter`: headers and config now, tensors when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from fedlora_cli.adapter import Adapter, FullTensor, Kind, Module, widest
from fedlora_cli.errors import InputError, Report, keeping, refuse, reporting
from fedlora_cli.factors import Factors
from fedlora_cli.files.documents import exists
from fedlora_cli.files.safetensors import Entry, read_header
from fedlora_cli.formats.peft.config import Config, read_config
from fedlora_cli.formats.peft.names import (
    ADDED_TO_MODULES_TO_SAVE,
    CONFIG,
    PICKLE,
    PREFIX,
    WEIGHTS,
    factor_of,
    is_base_weight,
    meaning_of,
    owner_of,
)


def recognises(folder: Path) -> bool:
    """Whether the folder holds any file of a PEFT adapter."""
    return any(exists(folder / name) for name in (CONFIG, WEIGHTS, PICKLE))


def read(folder: Path, report: Report = refuse) -> Adapter:
    """The adapter in `folder`. The tensors tell what is adapted; the config must agree with them.

    Anything damaged, contradictory, or not understood goes to `report`, fault by fault; if that
    returns, the adapter is what is left without it.
    """
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    # What was refused may be what is found missing later, and then that is no fault of its own.
    refused: list[InputError] = []
    told = keeping(report, refused)
    pickled = not exists(weights) and exists(pickle)
    if pickled:
        cure = "load it where it was trained and save_pretrained(safe_serialization=True)"
        told(InputError(pickle, "a pickle, which is never opened", cure))
    config, facts, unknown = read_config(folder / CONFIG, report)
    entries: dict[str, Entry] = {}
    if not pickled:
        with reporting(told):
            entries = read_header(weights, told)

    pairs, others = _sort(weights, entries, told)
    if not pairs:
        cure = "save the adapter, not the base model"
        report(_explained(InputError(weights, "no LoRA tensors in it", cure), refused))
    # Before the factors: a tensor of another kind explains why a factor is missing.
    tensors: dict[str, FullTensor] = {}
    for name, entry in others.items():
        with reporting(told):
            tensors[name] = _full_tensor(weights, name, entry, pairs, config)
    modules: dict[str, Module] = {}
    for name in sorted(pairs):
        with reporting(report):
            B, A = _factors(weights, name, pairs[name], refused, report)
            modules[name] = _module(weights, name, pairs[name].kind, B, A, config, report)
    notes = []
    if unknown:
        notes.append(f"{folder.name}/{CONFIG}: unknown fields ignored: {', '.join(unknown)[:200]}")
    with reporting(report):
        absent = set(config.modules_to_save) - ADDED_TO_MODULES_TO_SAVE
        if absent and all(tensor.owner is None for tensor in tensors.values()):
            heads = ", ".join(sorted(absent))[:200]
            notes.append(f"{folder.name}: modules_to_save names {heads}, but has no tensor of them")
    if exists(pickle) and not pickled:
        notes.append(f"{folder.name}/{PICKLE}: ignored, as PEFT does; {WEIGHTS} counts")
    return Adapter(folder, weights, modules, tensors, facts, tuple(notes))


def _explained(fault: InputError, refused: Sequence[InputError]) -> InputError:
    """Something missing, or what was refused before and may be it."""
    return next(iter(refused), fault)


@dataclass(frozen=True)
class _Pair:
    """What there is of the factors of one module, by side: "B" and "A"."""

    kind: Kind
    sides: dict[str, Entry]


def _sort(
    weights: Path, entries: Mapping[str, Entry], report: Report
) -> tuple[dict[str, _Pair], dict[str, Entry]]:
    """The factors by module, and all else by name."""
    pairs: dict[str, _Pair] = {}
    others: dict[str, Entry] = {}
    for key, entry in entries.items():
        factor = factor_of(key)
        if not key.startswith(PREFIX):
            found = f"a tensor named {key}"
            report(InputError(weights, found, f"PEFT's names begin with {PREFIX}"))
        elif factor is None:
            others[key.removeprefix(PREFIX)] = entry
        else:
            module, kind, side = factor
            pair = pairs.setdefault(module, _Pair(kind, {}))
            if pair.kind == kind:
                pair.sides[side] = entry
            else:
                report(InputError(weights, f"{module} has two kinds of factors", "save it again"))
    return pairs, others


def _factors(
    weights: Path, name: str, pair: _Pair, refused: Sequence[InputError], report: Report
) -> tuple[Entry, Entry]:
    """B and A of one module, which the file alone shows to be a pair. Raises InputError."""
    if not name:
        raise InputError(weights, "factors of a module without a name", "save it again")
    if ".base_layer" in f".{name}":
        _not_understood(weights, name, "nested LoRA (mixtures of experts, multi-head attention)")
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair.sides:
            found = f"{name} has lora_{other} but no lora_{side}"
            cure = "save the adapter again, whole"
            raise _explained(InputError(weights, found, cure), refused)
    B, A = pair.sides["B"], pair.sides["A"]
    broken: list[InputError] = []
    for entry in (B, A):
        with reporting(keeping(report, broken)):
            _check_factor(weights, entry)
    if broken:
        raise broken[0]
    if B.shape[1] != A.shape[0]:
        found = f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)} differ in rank"
        raise InputError(weights, found, "A is (rank, in), B is (out, rank)")
    return B, A


def _module(
    weights: Path, name: str, kind: Kind, B: Entry, A: Entry, config: Config, report: Report
) -> Module:
    """One adapted module. Where the config contradicts its factors, these are the truth."""
    rank = A.shape[0]
    with reporting(report):
        if config.rank(name) != rank:
            found = f"{name} has rank {rank}, but {config.path.name} says {config.rank(name)}"
            cure = "correct r or rank_pattern; the tensors are the truth"
            raise InputError(weights, found, cure)
    with reporting(report):
        if not config.targets.match(name):
            found = f"{name} has LoRA tensors, but target_modules does not match it"
            cure = "correct target_modules; PEFT would ignore the tensors"
            raise InputError(weights, found, cure)
    alpha = scale = math.nan
    with reporting(report):
        alpha = config.alpha(name)
        scale = config.scale(alpha, rank)
    return Module(
        shape=(B.shape[0], A.shape[1]),
        rank=rank,
        alpha=alpha,
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


def _read_factors(B: Entry, A: Entry, scale: float, report: Report = refuse) -> Factors:
    return Factors(B.read(report), A.read(report), scale)


def _full_tensor(
    weights: Path, name: str, entry: Entry, adapted: Container[str], config: Config
) -> FullTensor:
    """What is not a factor: trained heads, base embeddings; anything else is refused by name."""
    owner = owner_of(name, config.modules_to_save)
    if owner is None and not is_base_weight(name, adapted):
        if config.variants:
            raise config.variants[0]
        _not_understood(weights, name, meaning_of(name))
    return FullTensor(entry.shape, entry.dtype, owner, entry.read)


def _not_understood(weights: Path, name: str, meaning: str) -> NoReturn:
    raise InputError(weights, f"{name}: {meaning}", "not understood yet; train plain LoRA")
