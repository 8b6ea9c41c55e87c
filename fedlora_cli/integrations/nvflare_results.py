"""Results of NVFlare's sites as adapters, without NVFlare: parts of `nvflare.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.integrations.nvflare_site import LORA, shapes_of
from fedlora_cli.methods import find
from fedlora_cli.rounds.state_dict import StateDict, check_tensors

#: NVFlare's mark in the metadata of an encrypted or quantized result.
_PROCESSED = "PROCESSED_ALGORITHM"


def settings(further: Mapping[str, Any], **named: Any) -> AggregateOptions:
    """The options of an aggregation. Raises UsageError."""
    free = {field.name for field in fields(AggregateOptions)} - set(named)
    for name in further:
        if name not in free:
            found = f"{name!r} is no further option"
            raise UsageError("options", found, f"use {', '.join(sorted(free))}")
    options = AggregateOptions(**{"allow_copies": True, **named, **further})
    find(options.method)
    return options


def upload_of(site: str, model: Any, weight_key: str) -> StateDict:
    """The adapter in a site's result. Raises InputError."""
    if model.params_type != "FULL":
        found = f"its result is a difference ({model.params_type})"
        raise InputError(site, found, "set params_transfer_type to FULL")
    changed = model.meta.get(_PROCESSED)
    if changed is not None:
        found = f"its tensors are encrypted or quantized ({changed})"
        raise InputError(site, found, "remove the filter: fedlora reads the factors of each site")
    config = model.meta.get(LORA)
    if not isinstance(config, Mapping):
        found = f"its result has no config of an adapter in meta[{LORA!r}]"
        raise InputError(site, found, "send it with meta=lora_meta(model, samples)")
    if not isinstance(model.params, Mapping):
        found = f"its parameters are of type {type(model.params).__name__}"
        raise InputError(site, found, "send get_peft_model_state_dict(model)")
    samples = model.meta.get(weight_key)
    if not isinstance(samples, (int, float, type(None))) or isinstance(samples, bool):
        raise InputError(site, f"meta[{weight_key!r}] is {samples!r}", "send a number of samples")
    tensors = {name: _read(value) for name, value in model.params.items()}
    upload = StateDict(tensors, config, samples)
    check_tensors(site, upload)
    return upload


def _read(value: Any) -> Any:
    """A reference to a tensor on disk, of enable_tensor_disk_offload, as the tensor."""
    return value.materialize() if hasattr(value, "materialize") else value


def at_fixed_rank(
    options: AggregateOptions, shapes: Mapping[str, tuple[int, ...]]
) -> AggregateOptions:
    """The options with the rank that NVFlare's persistor keeps. Raises UsageError."""
    cure = "start from `adapter`, so that FedLoRAPersistor stores any rank"
    method = find(options.method)
    grows = method.compress == "none" and method.merge == "sum"
    if grows or options.energy is not None:
        found = f"{options.method}, with a rank that changes" if grows else "the rank may change"
        raise UsageError("persistor", f"{found}, but NVFlare's persistor keeps its rank", cure)
    ranks = [min(shape) for name, shape in shapes.items() if "lora_A" in name]
    return replace(options, rank=max(ranks)) if ranks and options.rank is None else options


def check_shapes(tensors: Mapping[str, Any], fixed: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError if NVFlare's persistor would refuse the global adapter."""
    for name, shape in shapes_of(tensors).items():
        if name in fixed and shape != fixed[name]:
            found = f"{shape}, but NVFlare's persistor keeps {fixed[name]}"
            cure = "start from `adapter`, so that FedLoRAPersistor stores any rank"
            raise InputError(name, found, cure)


def mean_metrics(
    samples: Mapping[str, float], metrics: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """The sample-weighted mean of each metric over the sites that report it.

    `samples` are the counts of the sites in the round, whose adapters were aggregated.
    """
    sums: dict[str, tuple[float, float]] = {}
    for site, count in sorted(samples.items()):
        for name, value in metrics.get(site, {}).items():
            if isinstance(value, (int, float)):
                total, weight = sums.get(name, (0.0, 0.0))
                sums[name] = (total + count * value, weight + count)
    return {name: total / weight for name, (total, weight) in sums.items() if weight}
