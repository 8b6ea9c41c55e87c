"""Turning the fused experts that PEFT before 0.19 stored transposed.

A fused expert has a weight of shape (out, in) in most models and (in, out) in a few. PEFT before
0.19 took every weight as (in, out), so that for most models its A is today's Bᵀ and its B today's
Aᵀ. The PEFT version of each file is known, the kind of model is not. Clients of both versions show
the kind: the shapes of a module are equal for the few models and transposed for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import Adapter, Module
from fedlora_cli.clients.majority import exclude
from fedlora_cli.errors import FaultHandler
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

_CURE = "train all clients with one version of PEFT, or save the older adapters again with it"


def with_one_orientation(adapters: Sequence[Adapter], on_fault: FaultHandler) -> list[Adapter]:
    """The adapters, with the experts of older files as PEFT stores them since 0.19.

    If all files are older, or none is, nothing changes. The majority of the newer files decides the
    shape of a module. Square experts follow the experts of the same name that are not square. If no
    expert of a name shows its orientation, a fault goes to `on_fault`.
    """
    experts = [(adapter, modules) for adapter in adapters if (modules := _experts(adapter))]
    older = [(adapter, modules) for adapter, modules in experts if adapter.metadata.old_experts]
    newer = [(adapter, modules) for adapter, modules in experts if not adapter.metadata.old_experts]
    if not older or not newer:
        return list(adapters)
    votes: dict[str, Counter[tuple[int, int]]] = {}
    for _, modules in newer:
        for name, module in modules.items():
            votes.setdefault(name, Counter())[module.shape] += 1
    shapes = {name: most.most_common(1)[0][0] for name, most in votes.items()}
    turned, equal = set(), set()
    for _, modules in older:
        for name, module in modules.items():
            rows, columns = module.shape
            if rows != columns and shapes.get(name) == (columns, rows):
                turned.add(_kind(module))
            if rows != columns and shapes.get(name) == (rows, columns):
                equal.add(_kind(module))
    kinds = {_kind(module) for _, modules in older for module in modules.values()}
    for kind in sorted(kinds - (turned ^ equal)):
        exclude(
            (_with_kind(kind, older), _found(kind, "before 0.19", "a later version")),
            (_with_kind(kind, newer), _found(kind, "0.19 or later", "an older version")),
            _CURE,
            on_fault,
        )
    return [_turned(one, turned - equal) if one.metadata.old_experts else one for one in adapters]


def all_older(adapters: Sequence[Adapter]) -> bool:
    """Whether PEFT before 0.19 stored all experts; false without experts."""
    with_experts = [adapter for adapter in adapters if _experts(adapter)]
    return bool(with_experts) and all(adapter.metadata.old_experts for adapter in with_experts)


def older_experts(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A remark if PEFT before 0.19 stored the experts of all adapters."""
    if not all_older(adapters):
        return ()
    return (
        "PEFT before 0.19 stored the experts of all clients: load the global adapter with such a "
        "version, because later versions transpose the experts of most models",
    )


def _experts(adapter: Adapter) -> dict[str, Module]:
    modules = adapter.modules.items()
    return {name: module for name, module in modules if module.layout.kind == "experts"}


def _kind(module: Module) -> str:
    """The name of the module within its layer, equal in all layers."""
    return module.layout.target.rpartition(".")[2]


def _with_kind(kind: str, adapters: Sequence[tuple[Adapter, dict[str, Module]]]) -> list[Adapter]:
    """The adapters with experts of this kind."""
    return [adapter for adapter, modules in adapters if kind in map(_kind, modules.values())]


def _found(kind: str, version: str, other: str) -> str:
    return (
        f"PEFT {version} stored its {kind}, and their shapes do not show whether the factors have "
        f"the orientation that {other} stored in"
    )


def _turned(adapter: Adapter, kinds: set[str]) -> Adapter:
    """The adapter with every expert of these kinds transposed."""
    modules = {
        name: (
            _transpose(module)
            if module.layout.kind == "experts" and _kind(module) in kinds
            else module
        )
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _transpose(module: Module) -> Module:
    if module.layout.turned:
        return module
    rows, columns = module.shape
    return replace(
        module,
        shape=(columns, rows),
        layout=replace(module.layout, turned=True),
        build=partial(_build, module),
    )


def _build(module: Module, tensors: Sequence[Tensor]) -> Factors:
    return module.build(tensors).transposed
