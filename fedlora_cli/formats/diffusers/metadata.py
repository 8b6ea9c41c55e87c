"""The fields of PEFT's config in the metadata of a file, by component: read and written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedlora_cli.adapters.adapter import AdapterMetadata, NewAdapter
from fedlora_cli.errors import FaultHandler, InputError
from fedlora_cli.files.documents import parse_object
from fedlora_cli.formats.diffusers.names import FLATTENED, METADATA, PLAIN, component_of
from fedlora_cli.formats.peft.config import Config, config_of
from fedlora_cli.formats.shared import as_json_number, most_common
from fedlora_cli.formats.single import LoraFile

#: Fields of PEFT's config that train more than the factors, with their values in plain LoRA.
_MORE = {
    "bias": "none",
    "lora_bias": False,
    "dora": False,
    "target_parameters": (),
    "layer_replication": (),
    "invocation_tokens": (),
}


def fields_of(file: LoraFile) -> dict[str, Any] | None:
    """The fields of PEFT's config, named with their components, or None. Raises InputError."""
    if METADATA not in file.metadata:
        return None
    try:
        return parse_object(file.metadata[METADATA].encode(), where=file.weights)
    except InputError as fault:
        raise InputError(file.weights, f"{METADATA}: {fault.found}", fault.cure) from None


def configs_in(
    file: LoraFile,
    fields: Mapping[str, Any],
    components: Iterable[str | None],
    on_fault: FaultHandler,
) -> tuple[dict[str, tuple[Config, AdapterMetadata]], tuple[str, ...]]:
    """The valid configs of these components, and remarks for the user."""
    configs: dict[str, tuple[Config, AdapterMetadata]] = {}
    notes = []
    for component in sorted({name for name in components if name is not None}):
        prefix = f"{component}." if component else ""
        raw = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        faults: list[InputError] = []
        config, metadata = config_of(file.weights, raw, faults.append)
        more = [name for name, plain in _MORE.items() if getattr(metadata, name) != plain]
        if not raw:
            cure = f"save it with {component}_lora_adapter_metadata, as its other components"
            faults = [InputError(file.weights, f"no field of {component}", cure)]
        elif raw.get("peft_type", "LORA") != "LORA":
            found = f"peft_type is {str(raw['peft_type'])[:80]}"
            faults = [InputError(file.weights, found, "only LORA adapters are understood")]
        elif not faults and (more or config.modules_to_save or config.trainable_tokens):
            found = f"{', '.join(more) or 'more than factors'} is trained, too"
            faults = [InputError(file.weights, found, PLAIN)]
        for fault in faults[:1]:
            found = f"{METADATA} of {component or 'the model'}: {fault.found}"
            on_fault(InputError(file.weights, found, fault.cure))
        if not faults:
            configs[component] = config, metadata
        if metadata.unknown_fields:
            unknown = ", ".join(f"{prefix}{text}" for text in metadata.unknown_fields)[:200]
            found = f"unknown fields of {METADATA} may change the meaning of the tensors"
            notes.append(f"{file.weights.name}: {found}: {unknown}")
    return configs, tuple(notes)


def configured(
    file: LoraFile, name: str, component: str, rank: int, config: Config
) -> tuple[float, float]:
    """Alpha and scale of a module from its component's config. Raises InputError."""
    module = name.removeprefix(f"{component}.") if component else name
    if config.rank(module) != rank:
        found = f"{name} has rank {rank}, but {METADATA} gives it {config.rank(module)}"
        raise InputError(file.weights, found, "correct r or rank_pattern to match the tensors")
    if not config.targets.match(module):
        found = f"{name} has LoRA tensors, but target_modules in {METADATA} does not match it"
        raise InputError(file.weights, found, "correct target_modules; PEFT may drop the tensors")
    alpha = config.alpha(module)
    return alpha, config.scale(alpha, rank)


def fields_for(adapter: NewAdapter) -> dict[str, Any]:
    """The fields of PEFT's config of every component, each name with its component."""
    components: dict[str, list[str]] = {}
    for name in sorted(adapter.factors):
        components.setdefault(component_of(name, bare=True) or "", []).append(name)
    fields: dict[str, Any] = {}
    for component, names in components.items():
        prefix = f"{component}." if component else ""
        modules = {name: name.removeprefix(prefix) for name in names}
        keys = {_exactly(module): name for name, module in modules.items()}
        rank, ranks = _patterns({key: adapter.factors[name].rank for key, name in keys.items()})
        alpha, alphas = _patterns(
            {key: as_json_number(adapter.alphas[name]) for key, name in keys.items()}
        )
        config = {
            "alpha_pattern": alphas,
            "base_model_name_or_path": adapter.metadata.base_model,
            "bias": "none",
            "inference_mode": False,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_bias": False,
            "lora_dropout": adapter.metadata.dropout,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": ranks,
            "target_modules": _targets(modules.values()),
            "use_dora": False,
            "use_rslora": adapter.metadata.rslora,
        }
        fields |= {f"{prefix}{key}": value for key, value in config.items()}
    return fields


def _targets(names: Iterable[str]) -> list[str] | str:
    """`target_modules` for these modules: their names, or an expression if a name has no dot, since
    other names may end in it.
    """
    ordered = sorted(names)
    if all("." in name for name in ordered):
        return [name.removeprefix(FLATTENED) for name in ordered]
    return "|".join(map(_exactly, ordered))


def _exactly(name: str) -> str:
    r"""The expression that matches a module's name, with or without `text_model.`.

    >>> _exactly("conv_in"), _exactly("text_model.final")
    ('^conv_in', '^(text_model\\.)?final')
    """
    short = name.removeprefix(FLATTENED)
    optional = "" if short == name else f"({re.escape(FLATTENED)})?"
    return f"^{optional}{re.escape(short)}"


def _patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and the modules with other values.

    >>> _patterns({"^a.q": 8, "^a.v": 8, "^a.o": 4})
    (8, {'^a.o': 4})
    """
    default = most_common(values)
    return default, {name: values[name] for name in sorted(values) if values[name] != default}
