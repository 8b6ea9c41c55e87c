"""The `Adapter` in a PEFT folder: headers and config are read now, tensors on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, FullTensor
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, raise_fault, recording
from fedlora_cli.files.documents import exists
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.formats import mlx
from fedlora_cli.formats.peft.config import Config, read_config
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
)
from fedlora_cli.formats.peft.pairs import Pair, WeightsFile, explained, modules_of
from fedlora_cli.formats.peft.parts import Parts
from fedlora_cli.formats.peft.ties import implied_targets, tied_modules
from fedlora_cli.remote import Location, normal
from fedlora_cli.text import shortened


def is_peft(folder: Location) -> bool:
    """Whether the folder holds any file of a PEFT adapter."""
    return any(exists(folder / name) for name in (CONFIG, WEIGHTS, PICKLE))


def read(folder: Location, on_fault: FaultHandler = raise_fault) -> Adapter:
    """The adapter in `folder`: its tensors define the modules, and the config must agree with them.
    Faults go to `on_fault`.
    """
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    # Faults of tensors explain why others are missing; those are then not reported again.
    faults: list[InputError] = []
    record = recording(on_fault, faults)
    pickled = not exists(weights) and exists(pickle)
    if pickled:
        cure = "load it where it was trained and save_pretrained(safe_serialization=True)"
        record(InputError(pickle, "a pickle, which is never opened", cure))
    config, metadata = read_config(folder / CONFIG, on_fault)
    if isinstance(config.source, mlx.AnotherFormat):
        return Adapter(folder, weights, {}, {}, metadata)
    infos: dict[str, TensorInfo] = {}
    if not pickled:
        with catching_faults(record):
            infos = read_header(weights, record)

    pairs, others, foreign = _sort(weights, infos, record)
    if not pairs:
        cure = "save the adapter, not the base model"
        on_fault(explained(InputError(weights, "no LoRA tensors in it", cure), faults))
    with catching_faults(on_fault):
        config = replace(config, implied=implied_targets(pairs, config))
    parts = Parts.of(weights, next((info.state.size for info in infos.values()), 0))
    file = WeightsFile(weights, config, parts, faults)
    # Before the factors: a tensor of another kind explains why a factor is missing.
    roles = roles_of(file, others, pairs, record)
    modules = modules_of(file, pairs, on_fault)
    tensors: dict[str, FullTensor] = {}
    for stored, role in roles.items():
        if role != "lora_bias" or stored.removesuffix(LORA_BIAS) in modules:
            with catching_faults(record):
                for name, tensor in full_tensors(file, stored, role, others[stored], modules):
                    if name in tensors:
                        raise _twice(weights, stored, name)
                    tensors[name] = tensor
    with catching_faults(on_fault):
        bare = [name for name in modules if f"{name}{MAGNITUDE}" not in tensors]
        if metadata.dora and bare:  # PEFT would draw random magnitudes
            found = f"use_dora is true, but {bare[0]} has no magnitudes"
            raise InputError(weights, found, "save the adapter again, whole")
    with catching_faults(on_fault):
        saved = {name: others[name] for name, role in roles.items() if role == "saved"}
        metadata = replace(metadata, tied=tied_modules(pairs, saved, config))
    notes = _notes(folder, config, metadata, foreign)
    with catching_faults(on_fault):
        absent = set(config.modules_to_save) - ADDED_TO_MODULES_TO_SAVE
        if absent and all(tensor.role != "saved" for tensor in tensors.values()):
            heads = ", ".join(sorted(absent))[:200]
            found = f"modules_to_save names {heads}, but the file has no tensor of them"
            notes.append(f"{normal(folder).name}: {found}")
    return Adapter(folder, weights, modules, dict(sorted(tensors.items())), metadata, tuple(notes))


def _notes(
    folder: Location, config: Config, metadata: AdapterMetadata, foreign: Sequence[str]
) -> list[str]:
    """Remarks for the user about fields and names that PEFT does not write."""
    notes, label = [], normal(folder).name
    if metadata.unknown_fields:
        found = "unknown fields may change the meaning of the tensors"
        notes.append(f"{label}/{CONFIG}: {found}: {', '.join(metadata.unknown_fields)[:200]}")
    without_class = config.known and metadata.task_type is None and metadata.model_class is None
    if without_class and (named := config.fields.raw.get("auto_mapping")):
        found = f"auto_mapping is {named!r:.120}, not a model class of transformers"
        cure = "it is left out; AutoPeftModel needs it or a task_type"
        notes.append(f"{label}/{CONFIG}: {found}; {cure}")
    if foreign:
        found = f"tensor names read as PEFT writes them: {shortened(sorted(foreign), 1)}"
        notes.append(f"{label}: {found}")
    return notes


def _twice(weights: Location, key: str, name: str) -> InputError:
    found = f"{key}: another tensor has the name {name}, too"
    return InputError(weights, found, "save one adapter in one file")


def _sort(
    weights: Location, infos: Mapping[str, TensorInfo], on_fault: FaultHandler
) -> tuple[dict[str, Pair], dict[str, TensorInfo], tuple[str, ...]]:
    """The pairs of factors, the other tensors by name, and keys that PEFT writes otherwise."""
    pairs: dict[str, Pair] = {}
    others: dict[str, TensorInfo] = {}
    foreign: list[str] = []
    unprefixed: list[str] = []
    seen: set[str] = set()
    for key, info in infos.items():
        name = normalized(key)
        if name != key:
            foreign.append(key)
        if is_redundant(name, infos):
            continue
        if not name.startswith(PREFIX):
            unprefixed.append(key)
        elif name in seen:
            on_fault(_twice(weights, key, name))
        elif (factor := factor_of(name)) is None:
            others[name.removeprefix(PREFIX)] = info
        else:
            module, kind, side = factor
            pair = pairs.setdefault(module, Pair(kind, {}))
            if pair.kind == kind:
                pair.sides[side] = info
            else:
                on_fault(InputError(weights, f"{module} has two kinds of factors", "save it again"))
        seen.add(name)
    if unprefixed:
        on_fault(_without_prefix(weights, unprefixed))
    return pairs, others, tuple(foreign)


def _without_prefix(weights: Location, keys: Sequence[str]) -> InputError:
    """The error for all names without PEFT's prefix, which have one cause."""
    names = shortened(sorted(keys), 1)
    if mlx.has_factors(keys):
        return InputError(weights, f"{names}: {mlx.FOUND}", mlx.CURE)
    if not any(factor_of(normalized(PREFIX + key)) for key in keys):
        return InputError(weights, f"a tensor named {names}", f"PEFT's names begin with {PREFIX}")
    found = f"{names}: names without {PREFIX}, as of inject_adapter_in_model"
    cure = f"save by PeftModel.save_pretrained, or put {PREFIX} before every name"
    return InputError(weights, found, cure)
