"""Experts that PEFT before 0.19 stored the other way round, turned where their shapes tell.

A fused expert has a weight of (out, in) in most models, of (in, out) in a few. PEFT before 0.19
took every one for (in, out), so that of most models its A is what is Bᵀ now, and its B Aᵀ. The
version is known of each file, the kind of model is not. But clients of both versions show it: the
shapes of one module are equal in a model of the few, and each other's transpose in all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import Adapter, Module
from fedlora_cli.clients.compatibility import exclude
from fedlora_cli.errors import FaultHandler
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

_CURE = "train all clients with one version of PEFT, or save the older adapters again with it"


def with_one_orientation(adapters: Sequence[Adapter], on_fault: FaultHandler) -> list[Adapter]:
    """The adapters, with the experts of older files as PEFT stores them since 0.19.

    Where all files are older, or none is, nothing changes. The shapes of newer files are those that
    most of them have. Square experts do not tell: they lie as the other experts of the same name
    that are not square. Where nothing tells how a model's experts lie, a fault goes to `on_fault`.
    """
    experts = [(one, _experts(one)) for one in adapters]
    older = [(one, own) for one, own in experts if own and one.facts.old_experts]
    newer = [(one, own) for one, own in experts if own and not one.facts.old_experts]
    if not older or not newer:
        return list(adapters)
    votes: dict[str, Counter[tuple[int, int]]] = {}
    for _, own in newer:
        for name, module in own.items():
            votes.setdefault(name, Counter())[module.shape] += 1
    shapes = {name: most.most_common(1)[0][0] for name, most in votes.items()}
    turned, equal = set(), set()
    for _, own in older:
        for name, module in own.items():
            rows, columns = module.shape
            if rows != columns and shapes.get(name) == (columns, rows):
                turned.add(_kind(module))
            if rows != columns and shapes.get(name) == (rows, columns):
                equal.add(_kind(module))
    unknown = {_kind(module) for _, own in older for module in own.values()} - (turned ^ equal)
    for kind in sorted(unknown):
        exclude(
            (_holding(kind, older), _found(kind, "before 0.19", "a later version")),
            (_holding(kind, newer), _found(kind, "0.19 or later", "an older version")),
            _CURE,
            on_fault,
        )
    return [_turned(one, turned - equal) if one.facts.old_experts else one for one in adapters]


def all_older(adapters: Sequence[Adapter]) -> bool:
    """Whether PEFT before 0.19 stored the experts of every adapter that has any."""
    held = [one for one in adapters if _experts(one)]
    return bool(held) and all(one.facts.old_experts for one in held)


def older_experts(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A remark where the experts of all adapters lie as PEFT before 0.19 stored them."""
    if not all_older(adapters):
        return ()
    return (
        "PEFT before 0.19 stored the experts of all clients: load the global adapter with such a "
        "version, as later ones exchange the sides of most models' experts",
    )


def _experts(adapter: Adapter) -> dict[str, Module]:
    modules = adapter.modules.items()
    return {name: one for name, one in modules if one.layout.kind == "experts"}


def _kind(module: Module) -> str:
    """What the modules of one class are called in every layer."""
    return module.layout.pair.partition(".base_layer")[0].rpartition(".")[2]


def _holding(kind: str, adapters: Sequence[tuple[Adapter, dict[str, Module]]]) -> list[Adapter]:
    """The adapters with experts of this kind."""
    return [one for one, own in adapters if kind in map(_kind, own.values())]


def _found(kind: str, own: str, other: str) -> str:
    return (
        f"PEFT {own} stored its {kind}, and their shapes do not tell whether the factors lie as "
        f"those that {other} stored in"
    )


def _turned(adapter: Adapter, kinds: set[str]) -> Adapter:
    """The adapter with every expert of these kinds as its own transpose."""
    modules = {
        name: _transpose(one) if one.layout.kind == "experts" and _kind(one) in kinds else one
        for name, one in adapter.modules.items()
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
