"""A file to an `Adapter`: the header and the alphas now, factors when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, Module
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.formats import single
from fedlora_cli.formats.diffusers.metadata import configs_in, configured, metadata_of
from fedlora_cli.formats.diffusers.names import (
    ALPHA,
    BESIDE,
    IN_METADATA,
    IN_TENSORS,
    METADATA,
    NAMES,
    NOWHERE,
    OTHERS,
    UNKNOWN,
    component_of,
    prefix_of,
)
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import CONFIG as PEFT_CONFIG
from fedlora_cli.formats.peft.names import PREFIX as PEFT_PREFIX
from fedlora_cli.formats.peft.names import WEIGHTS as PEFT_WEIGHTS
from fedlora_cli.formats.peft.names import shortened_keys
from fedlora_cli.formats.single import LoraFile


def read(file: LoraFile, on_fault: FaultHandler) -> Adapter:
    """The adapter in a file. The alphas are read with the header, all else later.

    Anything damaged or not understood goes to `on_fault`, fault by fault; if that returns, the
    adapter is what is left without it.
    """
    told = recording(on_fault, file.refused)
    parts, foreign = single.parts_of(file, NAMES, told)
    single.report_kinds(file, single.kinds_of(foreign, OTHERS, UNKNOWN), told)
    try:
        metadata = metadata_of(file)
    except InputError as fault:
        told(fault)
        return Adapter(file.path, file.weights, {}, {}, AdapterMetadata(), format="diffusers")
    components = {name: component_of(name, bare=metadata is not None) for name in parts}
    single.report_kinds(file, _nameless(components), told)
    alphas: dict[str, float] = {}
    with catching_faults(told):
        alphas = single.read_alphas(file, parts, told)
    with catching_faults(told):
        _check_alphas(file, {name for name, own in parts.items() if "alpha" in own}, components)
    configs: dict[str, tuple[Config, AdapterMetadata]] = {}
    notes: tuple[str, ...] = ()
    if metadata is not None:
        configs, notes = configs_in(file, metadata, set(components.values()), told)
    modules: dict[str, Module] = {}
    for name in sorted(parts):
        component = components[name]
        if component is None or ("alpha" in parts[name] and name not in alphas):
            continue
        if metadata is not None and component not in configs:
            continue
        with catching_faults(told):
            B, A = single.pair_of(file, name, parts[name], NAMES)
            rank = A.shape[0]
            alpha = alphas.get(name, float(rank))
            scale = alpha / rank
            if component in configs:
                alpha, scale = configured(file, name, component, rank, configs[component][0])
            modules[name] = single.module_of(name, B, A, alpha, scale)
    facts = single.facts_of(file, told)
    with catching_faults(told):
        facts = _facts(file, facts, modules, components, configs, with_alphas=bool(alphas))
    return Adapter(file.path, file.weights, modules, {}, facts, notes, format="diffusers")


def _nameless(components: Mapping[str, str | None]) -> dict[tuple[str, str], list[str]]:
    """Modules of no component, by what they are and the way out."""
    others = (
        (
            (PEFT_PREFIX,),
            "a name of PEFT's, which has alpha in a file of its own",
            f"put the file into a folder with its {PEFT_CONFIG}, as {PEFT_WEIGHTS}",
        ),
    )
    unknown = (
        "a name that begins with no component, like unet., transformer. or text_encoder.",
        "save it with the pipeline's save_lora_weights",
    )
    return single.kinds_of([n for n, own in components.items() if own is None], others, unknown)


def _check_alphas(file: LoraFile, told: set[str], components: Mapping[str, str | None]) -> None:
    """A component has alphas in all modules or in none, as loaders disagree about the rest; and not
    in the metadata, too. Raises InputError.
    """
    if told and METADATA in file.metadata:
        found = f"alphas in tensors, {min(told)}{ALPHA} for one, and in {METADATA}"
        raise InputError(file.weights, found, "keep one of them; diffusers loads no file with both")
    within = {components[name] for name in told}
    lacking = [n for n, own in components.items() if own in within and n not in told]
    if lacking:
        found = f"{shortened_keys(lacking)} without {ALPHA}, which {min(told)} has"
        raise InputError(file.weights, found, "save it with the alphas of all modules, or of none")


def _facts(
    file: LoraFile,
    facts: AdapterMetadata,
    modules: Mapping[str, Module],
    components: Mapping[str, str | None],
    configs: Mapping[str, tuple[Config, AdapterMetadata]],
    *,
    with_alphas: bool,
) -> AdapterMetadata:
    """What the file says beside its factors, and how it says it. Raises InputError."""
    prefixes = sorted({prefix_of(name) for name in modules if components[name] not in BESIDE})
    if len(prefixes) > 1:
        found = f"names that begin with {' and with '.join(one or 'none' for one in prefixes)}"
        raise InputError(file.weights, found, "save one adapter in one file")
    said = [own for _, own in configs.values()]
    if len({own.rslora for own in said}) > 1:
        found = f"use_rslora is true for one component in {METADATA}, and false for another"
        raise InputError(file.weights, found, "train all components with the same use_rslora")
    source = IN_METADATA if configs else IN_TENSORS if with_alphas else NOWHERE
    names = {own.base_model for own in said} - {None}
    dropouts = {own.dropout for own in said}
    return replace(
        facts,
        unknown_fields=tuple(one for _, own in configs.values() for one in own.unknown_fields),
        base_model=facts.base_model or (names.pop() if len(names) == 1 else None),
        rslora=any(own.rslora for own in said),
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        key_prefix=prefixes[0] if prefixes else None,
        alpha_source=source if modules else None,
    )
