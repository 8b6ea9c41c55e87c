"""Turning the fused experts that earlier versions of PEFT stored transposed.

Two layouts (`adapters.expert_layouts`) of an expert are equal, or transposed: A of one is Bᵀ of the
other. The PEFT version of each file is known; the kind of model and the version of transformers are
not. Shapes show the relation of two layouts: those of a module are equal or transposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import Adapter, Module
from fedlora_cli.adapters.expert_layouts import LAYOUTS, SINCE_0_19_1, ExpertLayout
from fedlora_cli.clients.majority import exclude
from fedlora_cli.errors import FaultHandler
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

_WithExperts = tuple[Adapter, dict[str, Module]]

_CURE = (
    "train all clients with one version of PEFT, or save the older adapters again with it (a "
    "config without peft_version counts as older)"
)


def with_one_orientation(adapters: Sequence[Adapter], on_fault: FaultHandler) -> list[Adapter]:
    """The adapters, with all experts in the newest layout that one of them has.

    The majority of the files in the newest layout decides the shape of a module. Square experts
    follow the experts of the same name and layout that are not square. If no expert of a name shows
    its orientation, a fault goes to `on_fault`.
    """
    newest = common_layout(adapters)
    by_layout: dict[ExpertLayout, list[_WithExperts]] = {}
    for adapter in adapters:
        if modules := _experts(adapter):
            by_layout.setdefault(adapter.metadata.expert_layout, []).append((adapter, modules))
    newer = by_layout.pop(newest, [])
    turned = {layout: _kinds_to_turn(older, newer, on_fault) for layout, older in by_layout.items()}
    return [
        _turned(adapter, kinds)
        if (kinds := turned.get(adapter.metadata.expert_layout))
        else adapter
        for adapter in adapters
    ]


def _kinds_to_turn(
    older: Sequence[_WithExperts], newer: Sequence[_WithExperts], on_fault: FaultHandler
) -> set[str]:
    """The kinds of experts that the files of one layout have transposed, compared to the newer."""
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
    old, new = (side[0][0].metadata.expert_layout.versions for side in (older, newer))
    for kind in sorted(kinds - (turned ^ equal)):
        exclude(
            (_with_kind(kind, older), _found(kind, old, new)),
            (_with_kind(kind, newer), _found(kind, new, old)),
            _CURE,
            on_fault,
        )
    return turned - equal


def common_layout(adapters: Sequence[Adapter]) -> ExpertLayout:
    """The newest layout of the adapters with experts; the last of all without experts."""
    layouts = [adapter.metadata.expert_layout for adapter in adapters if _experts(adapter)]
    return max(layouts, key=LAYOUTS.index, default=SINCE_0_19_1)


def older_experts(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A remark if no adapter has its experts in the layout of today's PEFT."""
    layout = common_layout(adapters)
    if layout == SINCE_0_19_1:
        return ()
    return (
        f"PEFT {layout.versions} stored the experts of the clients: load the global adapter with "
        "such a version, because other versions transpose the experts of most models",
    )


def _experts(adapter: Adapter) -> dict[str, Module]:
    modules = adapter.modules.items()
    return {name: module for name, module in modules if module.layout.kind == "experts"}


def _kind(module: Module) -> str:
    """The name of the module within its layer, equal in all layers."""
    return module.layout.target.rpartition(".")[2]


def _with_kind(kind: str, adapters: Sequence[_WithExperts]) -> list[Adapter]:
    """The adapters with experts of this kind."""
    return [adapter for adapter, modules in adapters if kind in map(_kind, modules.values())]


def _found(kind: str, version: str, other: str) -> str:
    return (
        f"PEFT {version} stored its {kind}, and their shapes do not show whether the factors have "
        f"the orientation that PEFT {other} stored in"
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
