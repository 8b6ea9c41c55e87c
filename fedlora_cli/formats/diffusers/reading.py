"""The `Adapter` in a file: the header and the alphas are read now, the factors on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, Module
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.formats import single
from fedlora_cli.formats.diffusers.metadata import configs_in, configured, fields_of
from fedlora_cli.formats.diffusers.names import (
    ALPHA,
    BESIDE,
    IN_METADATA,
    IN_TENSORS,
    METADATA,
    NAMES,
    NOWHERE,
    OTHERS,
    component_of,
    prefix_of,
)
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import CONFIG as PEFT_CONFIG
from fedlora_cli.formats.peft.names import PREFIX as PEFT_PREFIX
from fedlora_cli.formats.peft.names import WEIGHTS as PEFT_WEIGHTS
from fedlora_cli.formats.shared import module_of
from fedlora_cli.formats.single import LoraFile
from fedlora_cli.text import shortened

#: Parts of names of modules without a component, with their meaning and the remedy.
_WITHOUT_COMPONENT = (
    (
        (PEFT_PREFIX,),
        "a name of PEFT, which stores alpha in a separate file",
        f"put the file into a folder with its {PEFT_CONFIG}, as {PEFT_WEIGHTS}",
    ),
    (
        ("",),
        "a name that begins with no component, like unet., transformer. or text_encoder.",
        "save it with the pipeline's save_lora_weights",
    ),
)


def read(file: LoraFile, on_fault: FaultHandler) -> Adapter:
    """The adapter in a file; only the header and the alphas are read. Faults go to `on_fault`."""
    record = recording(on_fault, file.faults)
    parts, foreign = single.parts_of(file, NAMES, record)
    single.report_kinds(file, single.kinds_of(foreign, OTHERS), record)
    try:
        fields = fields_of(file)
    except InputError as fault:
        record(fault)
        return Adapter(file.path, file.weights, {}, {}, AdapterMetadata(), format="diffusers")
    components = {name: component_of(name, bare=fields is not None) for name in parts}
    bare = [name for name, component in components.items() if component is None]
    single.report_kinds(file, single.kinds_of(bare, _WITHOUT_COMPONENT), record)
    alphas: dict[str, float] = {}
    with catching_faults(record):
        alphas = single.read_alphas(file, parts, record)
    with catching_faults(record):
        with_alpha = {name for name, sides in parts.items() if "alpha" in sides}
        _check_alphas(file, with_alpha, components)
    configs: dict[str, tuple[Config, AdapterMetadata]] = {}
    notes: tuple[str, ...] = ()
    if fields is not None:
        configs, notes = configs_in(file, fields, components.values(), record)
    modules: dict[str, Module] = {}
    for name in sorted(parts):
        component = components[name]
        if component is None or ("alpha" in parts[name] and name not in alphas):
            continue
        if fields is not None and component not in configs:
            continue
        with catching_faults(record):
            B, A = single.pair_of(file, name, parts[name], NAMES)
            rank = A.shape[0]
            alpha = alphas.get(name, float(rank))
            scale = alpha / rank
            if component in configs:
                alpha, scale = configured(file, name, component, rank, configs[component][0])
            modules[name] = module_of(name, B, A, alpha, scale)
    metadata = single.adapter_metadata(file, record)
    with catching_faults(record):
        metadata = _metadata(file, metadata, modules, components, configs, with_alphas=bool(alphas))
    return Adapter(file.path, file.weights, modules, {}, metadata, notes, format="diffusers")


def _check_alphas(
    file: LoraFile, with_alpha: set[str], components: Mapping[str, str | None]
) -> None:
    """Raise InputError if alphas are in tensors and in the metadata, or if only some modules of a
    component have alphas: loaders disagree about the others.
    """
    if with_alpha and METADATA in file.metadata:
        found = f"alphas in tensors, such as {min(with_alpha)}{ALPHA}, and in {METADATA}"
        raise InputError(file.weights, found, "keep one of them; diffusers loads no file with both")
    affected = {components[name] for name in with_alpha}
    lacking = [n for n, part in components.items() if part in affected and n not in with_alpha]
    if lacking:
        found = f"no {ALPHA} of {shortened(sorted(lacking), 1)}, but of {min(with_alpha)}"
        raise InputError(file.weights, found, "save it with the alphas of all modules, or of none")


def _metadata(
    file: LoraFile,
    metadata: AdapterMetadata,
    modules: Mapping[str, Module],
    components: Mapping[str, str | None],
    configs: Mapping[str, tuple[Config, AdapterMetadata]],
    *,
    with_alphas: bool,
) -> AdapterMetadata:
    """The file's metadata, joined with those of the components. Raises InputError."""
    prefixes = sorted({prefix_of(name) for name in modules if components[name] not in BESIDE})
    if len(prefixes) > 1:
        found = f"names that begin with {' and with '.join(text or 'none' for text in prefixes)}"
        raise InputError(file.weights, found, "save one adapter in one file")
    parts = [part for _, part in configs.values()]
    if len({part.rslora for part in parts}) > 1:
        found = f"use_rslora is true for one component in {METADATA}, and false for another"
        raise InputError(file.weights, found, "train all components with the same use_rslora")
    source = IN_METADATA if configs else IN_TENSORS if with_alphas else NOWHERE
    names = {part.base_model for part in parts} - {None}
    dropouts = {part.dropout for part in parts}
    return replace(
        metadata,
        unknown_fields=tuple(text for part in parts for text in part.unknown_fields),
        base_model=metadata.base_model or (names.pop() if len(names) == 1 else None),
        rslora=any(part.rslora for part in parts),
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        key_prefix=prefixes[0] if prefixes else None,
        alpha_source=source if modules else None,
    )
