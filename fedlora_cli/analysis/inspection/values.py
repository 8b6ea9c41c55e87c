"""Reads every tensor once: what is not finite is a fault, what is all zero was never trained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedlora_cli import engine
from fedlora_cli.adapter import Adapter, FullTensor, Module, read_modules
from fedlora_cli.errors import InputError, Report, reporting
from fedlora_cli.factors import Factors
from fedlora_cli.fit import usual
from fedlora_cli.sizes import fault, sizes


@dataclass(frozen=True)
class Item:
    """A module or another tensor, and where it comes from."""

    adapter: Adapter
    name: str
    content: Module | FullTensor


@dataclass(frozen=True)
class Look:
    """What reading an item showed. `zeros` are its factors that are all zero, `digest` is that of
    base weights, which must be the same everywhere.
    """

    item: Item
    faults: tuple[InputError, ...]
    zeros: int = 0
    digest: str | None = None


def look_at(adapters: Sequence[Adapter], jobs: int, progress: engine.Progress) -> list[Look]:
    """Every tensor of these adapters, on so many threads; 0 is all cores. Raises nothing."""
    groups = [group for adapter in adapters for group in _groups(adapter)]
    looks = engine.run(_look, groups, jobs or engine.available_cores(), progress)
    return [look for group in looks for look in group]


def _groups(adapter: Adapter) -> list[list[Item]]:
    """What is read together: the experts that share a pair of factors, all else by itself."""
    pairs: dict[str, list[Item]] = {}
    for name, module in adapter.modules.items():
        pairs.setdefault(module.layout.pair, []).append(Item(adapter, name, module))
    tensors = ([Item(adapter, name, tensor)] for name, tensor in adapter.tensors.items())
    return [*pairs.values(), *tensors]


def check_base_weights(looks: Iterable[Look], report: Report) -> None:
    """Base weights are not trained, so clients that differ in them had different base models."""
    said: dict[str, list[tuple[str, Adapter]]] = {}
    for look in looks:
        if look.digest is not None:
            said.setdefault(look.item.name, []).append((look.digest, look.item.adapter))
    for name, digests in said.items():
        most = usual(digests)
        for digest, adapter in digests:
            if digest != most.value:
                found = f"its base weights {name} differ from the other clients'"
                cure = "start all clients from one base model with one vocabulary"
                report(most.misfit(adapter.weights_file, found, cure))


def _look(group: list[Item]) -> list[Look]:
    """What the group showed; of a fault in what experts share, the first of them tells."""
    if isinstance(group[0].content, FullTensor):
        return [_look_at_tensor(group[0], group[0].content)]
    faults: list[InputError] = []
    found: dict[str, Factors] = {}
    with reporting(faults.append):
        found = read_modules(group[0].adapter, [item.name for item in group], faults.append)
    looks = []
    for item in group:
        zeros = 0
        if item.name in found:
            factors = found.pop(item.name)
            zeros = sum(not factor.any() for factor in (factors.B, factors.A))
            # Without a scale, nobody knows how large the update is.
            known = not faults and not math.isnan(factors.scale)
            if known:
                found_fault = fault(item.adapter.path, item.name, sizes([factors])[0])
                faults += [] if found_fault is None else [found_fault]
        looks.append(Look(item, tuple(faults), zeros))
        faults = []
    return looks


def _look_at_tensor(item: Item, content: FullTensor) -> Look:
    faults: list[InputError] = []
    digest = None
    with reporting(faults.append):
        tensor = content.read(faults.append)
        if content.role == "base":
            # Equal numbers of any dtype, as bytes: with 0.0 added, there is no -0.0.
            digest = hashlib.sha256((tensor.double() + 0.0).numpy().tobytes()).hexdigest()
    return Look(item, tuple(faults), digest=digest)
