"""The fields of PEFT's config in the metadata of a file, by component: read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fedlora_cli.adapters.adapter import AdapterMetadata, NewAdapter
from fedlora_cli.errors import FaultHandler, InputError
from fedlora_cli.files.documents import parse_object
from fedlora_cli.formats.diffusers.names import FLATTENED, METADATA, PLAIN, component_of
from fedlora_cli.formats.peft.config import Config, config_of
from fedlora_cli.formats.single import LoraFile

T = TypeVar("T")

#: Fields of PEFT's config under which more is trained than the factors, and what a file without
#: that says.
_MORE = {
    "bias": "none",
    "lora_bias": False,
    "dora": False,
    "target_parameters": (),
    "layer_replication": (),
    "invocation_tokens": (),
}


def metadata_of(file: LoraFile) -> dict[str, Any] | None:
    """The fields of PEFT's config under names of components, None where there are none. Raises
    InputError.
    """
    if METADATA not in file.metadata:
        return None
    try:
        return parse_object(file.metadata[METADATA].encode(), where=file.weights)
    except InputError as fault:
        raise InputError(file.weights, f"{METADATA}: {fault.found}", fault.cure) from None


def configs_in(
    file: LoraFile,
    metadata: Mapping[str, Any],
    components: Iterable[str | None],
    on_fault: FaultHandler,
) -> tuple[dict[str, tuple[Config, AdapterMetadata]], tuple[str, ...]]:
    """The configs of these components, without those that are at fault, and remarks."""
    configs: dict[str, tuple[Config, AdapterMetadata]] = {}
    notes = []
    for component in sorted({one for one in components if one is not None}):
        prefix = f"{component}." if component else ""
        raw = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        faults: list[InputError] = []
        config, facts = config_of(file.weights, raw, faults.append)
        more = [name for name, plain in _MORE.items() if getattr(facts, name) != plain]
        if not raw:
            cure = f"save it with {component}_lora_adapter_metadata, as its other components"
            faults = [InputError(file.weights, f"nothing of {component}", cure)]
        elif raw.get("peft_type", "LORA") != "LORA":
            found = f"peft_type is {str(raw['peft_type'])[:80]}"
            faults = [InputError(file.weights, found, "only LORA adapters are understood")]
        elif not faults and (more or config.modules_to_save or config.has_tokens):
            found = f"{', '.join(more) or 'more than factors'} is trained, too"
            faults = [InputError(file.weights, found, PLAIN)]
        for fault in faults[:1]:
            found = f"{METADATA} of {component or 'the model'}: {fault.found}"
            on_fault(InputError(file.weights, found, fault.cure))
        if not faults:
            configs[component] = config, facts
        if facts.unknown_fields:
            found = f"fields of {METADATA} that are not known may change what the tensors mean"
            named = ", ".join(f"{prefix}{one}" for one in facts.unknown_fields)[:200]
            notes.append(f"{file.weights.name}: {found}: {named}")
    return configs, tuple(notes)


def configured(
    file: LoraFile, name: str, component: str, rank: int, config: Config
) -> tuple[float, float]:
    """Alpha and scale of a module by its component's config. Raises InputError."""
    module = name.removeprefix(f"{component}.") if component else name
    said = config.rank(module)
    if said != rank:
        found = f"{name} has rank {rank}, but {METADATA} says {said}"
        raise InputError(
            file.weights, found, "correct r or rank_pattern; the tensors are the truth"
        )
    if not config.targets.match(module):
        found = f"{name} has LoRA tensors, but target_modules in {METADATA} does not match it"
        raise InputError(file.weights, found, "correct target_modules; PEFT may drop the tensors")
    alpha = config.alpha(module)
    return alpha, config.scale(alpha, rank)


def metadata_for(adapter: NewAdapter) -> dict[str, Any]:
    """The fields of PEFT's config for every component, under its name."""
    components: dict[str, list[str]] = {}
    for name in sorted(adapter.factors):
        components.setdefault(component_of(name, bare=True) or "", []).append(name)
    fields: dict[str, Any] = {}
    for component, names in components.items():
        prefix = f"{component}." if component else ""
        own = {name: name.removeprefix(prefix) for name in names}
        rank, ranks = _usual({_exactly(own[n]): adapter.factors[n].rank for n in names})
        alpha, alphas = _usual({_exactly(own[n]): _number(adapter.alphas[n]) for n in names})
        config = {
            "alpha_pattern": alphas,
            "base_model_name_or_path": adapter.facts.base_model,
            "bias": "none",
            "inference_mode": False,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_bias": False,
            "lora_dropout": adapter.facts.dropout,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": ranks,
            "target_modules": _targets(own.values()),
            "use_dora": False,
            "use_rslora": adapter.facts.rslora,
        }
        fields |= {f"{prefix}{key}": value for key, value in config.items()}
    return fields


def _targets(names: Iterable[str]) -> list[str] | str:
    """`target_modules` for these modules: their names, as far as no other name ends in one."""
    ordered = sorted(names)
    if all("." in name for name in ordered):
        return [name.removeprefix(FLATTENED) for name in ordered]
    return "|".join(map(_exactly, ordered))


def _exactly(name: str) -> str:
    r"""The expression of a module's name, with and without what diffusers takes out of it.

    >>> _exactly("conv_in"), _exactly("text_model.final")
    ('^conv_in', '^(text_model\\.)?final')
    """
    short = name.removeprefix(FLATTENED)
    optional = "" if short == name else f"({re.escape(FLATTENED)})?"
    return f"^{optional}{re.escape(short)}"


def _usual(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The value that most modules have, and those with another.

    >>> _usual({"^a.q": 8, "^a.v": 8, "^a.o": 4})
    (8, {'^a.o': 4})
    """
    usual = Counter(values[name] for name in sorted(values)).most_common(1)[0][0]
    return usual, {name: values[name] for name in sorted(values) if values[name] != usual}


def _number(value: float) -> int | float:
    """A whole number as one, as people write alpha."""
    return int(value) if value == int(value) else value
