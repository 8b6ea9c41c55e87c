"""The contents of one adapter by its headers; equal modules are one group."""

from __future__ import annotations

import math
import re

from fedlora_cli.adapters.adapter import Adapter, Module
from fedlora_cli.remote import Location, Remote
from fedlora_cli.reports.inspect import InspectedAdapter, ModuleGroup, Origin, TensorRow
from fedlora_cli.text import printable


def contents(
    name: str, adapter: Adapter, samples: float | None, origin: Origin | None, zeros: int
) -> InspectedAdapter:
    """The report of one adapter, of whose factors `zeros` are all zero."""
    groups = _groups(adapter)
    tensors = tuple(
        TensorRow(key, tensor.shape, tensor.dtype, tensor.role, tensor.owner)
        for key, tensor in adapter.tensors.items()
    )
    dora = ["it uses DoRA; aggregate takes it with --dora approximate"] * adapter.metadata.dora
    untrained = [f"{zeros} of its factors are all zero: untrained or padded"] * (zeros > 0)
    in_tensors = sum(math.prod(tensor.shape) for tensor in tensors)
    return InspectedAdapter(
        name=name,
        path=text(adapter.path),
        base_model=adapter.metadata.base_model,
        revision=adapter.metadata.revision,
        task_type=adapter.metadata.task_type,
        rslora=adapter.metadata.rslora,
        rank=max((group.rank for group in groups), default=0),
        parameters=sum(group.parameters for group in groups) + in_tensors,
        bytes=_size(adapter.weights_file),
        samples=samples,
        modules=groups,
        tensors=tensors,
        origin=origin,
        notes=tuple(map(printable, (*adapter.notes, *dora, *untrained))),
    )


def _groups(adapter: Adapter) -> tuple[ModuleGroup, ...]:
    alike: dict[tuple[object, ...], dict[str, Module]] = {}
    for name, module in adapter.modules.items():
        key = (module.layout.kind, module.shape, module.rank, module.alpha, module.scale)
        alike.setdefault((_target(name), *key, module.dtype), {})[name] = module
    return tuple(_group(modules) for modules in alike.values())


def _group(modules: dict[str, Module]) -> ModuleGroup:
    name, first = next(iter(modules.items()))
    return ModuleGroup(
        target=_target(name),
        kind=first.layout.kind,
        shape=first.shape,
        rank=first.rank,
        alpha=first.alpha,
        scale=first.scale,
        dtype=first.dtype,
        parameters=len(modules) * first.rank * sum(first.shape),
        names=tuple(modules),
    )


def _target(name: str) -> str:
    """The last part of a module's name, after the last layer or block.

    >>> _target("model.layers.0.q_proj"), _target("lora_unet_blocks_1_transformer_0_attn1_to_q")
    ('q_proj', 'attn1_to_q')
    """
    return re.split(r"_\d+_", name.split(".")[-1])[-1]


def _size(path: Location) -> int | None:
    try:
        if isinstance(path, Remote):
            return path.size if path.is_file() else None
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def text(name: object) -> str:
    """The name with escapes for bytes that are not UTF-8, which no document can hold."""
    return str(name).encode(errors="backslashreplace").decode()
