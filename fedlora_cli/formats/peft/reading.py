"""A PEFT folder to an `Adapter`: headers and config now, tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora_cli.adapters.adapter import Adapter, FullTensor, Module
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, raise_fault, recording
from fedlora_cli.files.documents import exists
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.formats import mlx
from fedlora_cli.formats.peft.config import read_config
from fedlora_cli.formats.peft.full import full_tensors, roles_of
from fedlora_cli.formats.peft.names import (
    ADDED_TO_MODULES_TO_SAVE,
    CONFIG,
    LORA_BIAS,
    MAGNITUDE,
    PICKLE,
    PREFIX,
    WEIGHTS,
    factor_of,
    is_redundant,
    normalized,
    shortened_keys,
)
from fedlora_cli.formats.peft.pairs import Pair, explained, modules_of
from fedlora_cli.formats.peft.parts import Parts
from fedlora_cli.formats.peft.ties import implied_targets, tied_modules
from fedlora_cli.remote import Location, normal


def recognises(folder: Location) -> bool:
    """Whether the folder holds any file of a PEFT adapter."""
    return any(exists(folder / name) for name in (CONFIG, WEIGHTS, PICKLE))


def read(folder: Location, on_fault: FaultHandler = raise_fault) -> Adapter:
    """The adapter in `folder`. The tensors tell what is adapted; the config must agree with them.

    Anything damaged, contradictory, or not understood goes to `on_fault`, fault by fault; if that
    returns, the adapter is what is left without it.
    """
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    # What was refused may be what is found missing later, and then that is no fault of its own.
    refused: list[InputError] = []
    told = recording(on_fault, refused)
    pickled = not exists(weights) and exists(pickle)
    if pickled:
        cure = "load it where it was trained and save_pretrained(safe_serialization=True)"
        told(InputError(pickle, "a pickle, which is never opened", cure))
    config, facts = read_config(folder / CONFIG, on_fault)
    if isinstance(config.source, mlx.AnotherFormat):
        return Adapter(folder, weights, {}, {}, facts)
    entries: dict[str, TensorInfo] = {}
    if not pickled:
        with catching_faults(told):
            entries = read_header(weights, told)

    pairs, others, foreign = _sort(weights, entries, told)
    if not pairs:
        cure = "save the adapter, not the base model"
        on_fault(explained(InputError(weights, "no LoRA tensors in it", cure), refused))
    with catching_faults(on_fault):
        config = replace(config, implied=implied_targets(pairs, config))
    # Before the factors: a tensor of another kind explains why a factor is missing.
    roles = roles_of(weights, others, pairs, config, told)
    parts = Parts.of(weights, next((one.state.size for one in entries.values()), 0))
    modules = modules_of(weights, pairs, config, parts, refused, on_fault)
    tensors: dict[str, FullTensor] = {}
    for name, role in roles.items():
        if role != "lora_bias" or name.removesuffix(LORA_BIAS) in modules:
            with catching_faults(told):
                held = full_tensors(weights, name, role, others[name], modules, config, parts)
                for own, tensor in held:
                    if own in tensors:
                        found = f"{name}: {own} is there already"
                        raise InputError(weights, found, "save one adapter in one file")
                    tensors[own] = tensor
    with catching_faults(on_fault):
        if facts.dora:
            _check_magnitudes(weights, modules, tensors)
    with catching_faults(on_fault):
        saved = {name: others[name] for name, role in roles.items() if role == "saved"}
        facts = replace(facts, tied=tied_modules(pairs, saved, config))
    notes, called = [], normal(folder).name
    if facts.unknown_fields:
        found = "fields that are not known may change what the tensors mean"
        notes.append(f"{called}/{CONFIG}: {found}: {', '.join(facts.unknown_fields)[:200]}")
    foreign_class = config.known and facts.task_type is None and facts.model_class is None
    if foreign_class and (named := config.fields.raw.get("auto_mapping")):
        found = f"auto_mapping is {named!r:.120}, which names no model class of transformers"
        cure = "it is not passed on, and AutoPeftModel needs it, or a task_type"
        notes.append(f"{called}/{CONFIG}: {found}; {cure}")
    if foreign:
        found = f"tensor names read as PEFT writes them: {shortened_keys(foreign)}"
        notes.append(f"{called}: {found}")
    with catching_faults(on_fault):
        absent = set(config.modules_to_save) - ADDED_TO_MODULES_TO_SAVE
        if absent and all(tensor.role != "saved" for tensor in tensors.values()):
            heads = ", ".join(sorted(absent))[:200]
            notes.append(f"{called}: modules_to_save names {heads}, but has no tensor of them")
    return Adapter(folder, weights, modules, dict(sorted(tensors.items())), facts, tuple(notes))


def _sort(
    weights: Location, entries: Mapping[str, TensorInfo], on_fault: FaultHandler
) -> tuple[dict[str, Pair], dict[str, TensorInfo], tuple[str, ...]]:
    """The factors by their common name, all else by name, and keys that PEFT writes otherwise."""
    pairs: dict[str, Pair] = {}
    others: dict[str, TensorInfo] = {}
    foreign: list[str] = []
    unprefixed: list[str] = []
    seen: set[str] = set()
    for key, entry in entries.items():
        name = normalized(key)
        if name != key:
            foreign.append(key)
        if is_redundant(name, entries):
            continue
        if not name.startswith(PREFIX):
            unprefixed.append(key)
        elif name in seen:
            found = f"{key}: {name} is there already"
            on_fault(InputError(weights, found, "save one adapter in one file"))
        elif (factor := factor_of(name)) is None:
            others[name.removeprefix(PREFIX)] = entry
        else:
            module, kind, side = factor
            pair = pairs.setdefault(module, Pair(kind, {}))
            if pair.kind == kind:
                pair.sides[side] = entry
            else:
                on_fault(InputError(weights, f"{module} has two kinds of factors", "save it again"))
        seen.add(name)
    if unprefixed:
        on_fault(_without_prefix(weights, unprefixed))
    return pairs, others, tuple(foreign)


def _without_prefix(weights: Location, keys: Sequence[str]) -> InputError:
    """The error of names that lack what PEFT's begin with: one cause for all of them."""
    if mlx.has_factors(keys):
        return InputError(weights, f"{shortened_keys(keys)}: {mlx.FOUND}", mlx.CURE)
    if not any(factor_of(normalized(PREFIX + key)) for key in keys):
        found = f"a tensor named {shortened_keys(keys)}"
        return InputError(weights, found, f"PEFT's names begin with {PREFIX}")
    found = f"{shortened_keys(keys)}: names without {PREFIX}, as of inject_adapter_in_model"
    cure = f"save by PeftModel.save_pretrained, or put {PREFIX} before every name"
    return InputError(weights, found, cure)


def _check_magnitudes(
    weights: Location, modules: Mapping[str, Module], tensors: Mapping[str, FullTensor]
) -> None:
    """Under DoRA, every module has a magnitude; PEFT would draw one that is missing."""
    for name in modules:
        if f"{name}{MAGNITUDE}" not in tensors:
            found = f"use_dora is true, but {name} has no magnitudes"
            raise InputError(weights, found, "save the adapter again, whole")
