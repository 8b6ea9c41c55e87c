"""The fields of the `adapter_config.json` that fedlora writes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from fedlora_cli.adapters.adapter import AdapterMetadata, FactorLayout, NewAdapter, Selection
from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.names import TOKENS, target_of, token_of
from fedlora_cli.formats.peft.selection import modules_to_save, patterns, selection, token_indices
from fedlora_cli.formats.shared import as_json_number

T = TypeVar("T")


def config_names(
    layouts: Collection[FactorLayout],
    tensors: Collection[str],
    owners: Collection[str],
    metadata: AdapterMetadata,
) -> tuple[Selection, list[str]]:
    """The selection of modules, and `modules_to_save`; `owners` are the modules saved in full."""
    targets = {layout.target for layout in layouts if layout.kind != "experts"}
    known = _known(layouts, tensors)
    return (
        selection(targets, known, metadata.selections),
        modules_to_save(owners, known, metadata.saved_names),
    )


def _known(layouts: Collection[FactorLayout], tensors: Collection[str]) -> set[str]:
    """The modules of the base model in the names of factors and full tensors."""
    owners = {target_of(name.rpartition(".")[0]) for name in tensors}
    return owners | {layout.target for layout in layouts}


def _field(value: str | tuple[T, ...]) -> str | list[T] | None:
    """Names or an expression for JSON; None if there are none."""
    return value if isinstance(value, str) else list(value) or None


def config_for(adapter: NewAdapter) -> dict[str, Any]:
    """The fields with which PEFT applies scale · B A; no client's field is copied unchecked."""
    rank, ranks = patterns(_by_target(adapter, {n: f.rank for n, f in adapter.factors.items()}))
    numbers = {name: as_json_number(alpha) for name, alpha in adapter.alphas.items()}
    alpha, alphas = patterns(_by_target(adapter, numbers))
    metadata = adapter.metadata
    layouts = adapter.layouts.values()
    selected, saved = config_names(layouts, adapter.tensors, adapter.modules_to_save, metadata)
    config: dict[str, Any] = {
        "alpha_pattern": alphas,
        "base_model_name_or_path": metadata.base_model,
        "bias": metadata.bias,
        "exclude_modules": _field(selected.exclude),
        "fan_in_fan_out": metadata.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": _field(selected.layers_pattern),
        "layers_to_transform": _field(selected.layers),
        "lora_alpha": alpha,
        "lora_dropout": metadata.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "revision": metadata.revision,
        "target_modules": _field(selected.modules) or [],
        "task_type": metadata.task_type,
        "use_dora": metadata.dora,
        "use_rslora": metadata.rslora,
    }
    tokens: dict[str, list[int]] = {}
    for name in adapter.tensors:
        token = token_of(name)
        if token is not None:
            embedding = target_of(token[0].removesuffix(TOKENS))
            tokens.setdefault(embedding, []).append(token[1])
    written = {*adapter.factors, *adapter.modules_to_save}
    # Older versions of PEFT do not know these fields, so only those with a value are written.
    rare = {
        "auto_mapping": _auto_mapping(metadata),
        "lora_bias": metadata.lora_bias,
        "ensure_weight_tying": any(written.issuperset(tie) for tie in metadata.tied),
        "target_parameters": list(metadata.target_parameters),
        "trainable_token_indices": token_indices(
            tokens, _known(layouts, adapter.tensors), metadata.token_names
        ),
        "layer_replication": [*map(list, metadata.layer_replication)],
        "alora_invocation_tokens": list(metadata.invocation_tokens),
        "peft_version": _experts_version(layouts, metadata),
    }
    return config | {name: value for name, value in rare.items() if value}


def _auto_mapping(metadata: AdapterMetadata) -> dict[str, str] | None:
    """The class for AutoPeftModel to load; None if a task defines it."""
    if metadata.task_type is not None or metadata.model_class is None:
        return None
    library, _, model_class = metadata.model_class.rpartition(".")
    return {"base_model_class": model_class, "parent_library": library}


def _by_target(adapter: NewAdapter, values: Mapping[str, T]) -> dict[tuple[str, ...], T]:
    """The value of each module that a config can address, by the parts of its name; InputError if
    nested modules have different values.
    """
    result: dict[tuple[str, ...], T] = {}
    for name in sorted(adapter.factors):
        layout = adapter.layouts[name]
        target = tuple(map(re.escape, layout.target.split(".")))
        if layout.kind == "experts":
            # An unknown parameter means that all parameters have the same rank and alpha.
            parameter = re.escape(layout.parameter) or "[^.]+"
            target = (*target[:-1], rf"{target[-1]}\.{parameter}")
        if result.setdefault(target, values[name]) != values[name]:
            found = "PEFT has one rank and one alpha for it and the modules nested in it"
            raise InputError(name, found, "give all of them the same rank")
    return result


def _experts_version(layouts: Iterable[FactorLayout], metadata: AdapterMetadata) -> str | None:
    """`peft_version` for fused experts: a version that stores them in this layout."""
    has_experts = any(layout.kind == "experts" for layout in layouts)
    return metadata.expert_layout.stamp if has_experts else None
