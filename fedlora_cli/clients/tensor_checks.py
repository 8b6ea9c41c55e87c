"""Reads every tensor once: what is not finite is a fault, what is all zero was never trained."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.adapters.adapter import Adapter, FullTensor, Module, read_modules
from fedlora_cli.clients.compatibility import Majority
from fedlora_cli.errors import FaultHandler, InputError, catching_faults
from fedlora_cli.execution import engine
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.rounding import precision, same_up_to_rounding
from fedlora_cli.linalg.sizes import fault, sizes


@dataclass(frozen=True)
class Item:
    """A module or another tensor, and where it comes from."""

    adapter: Adapter
    name: str
    content: Module | FullTensor


@dataclass(frozen=True)
class Look:
    """What reading an item showed. `zeros` are its factors that are all zero; `digest` and
    `precision` are those of base weights, which must be the same everywhere.
    """

    item: Item
    faults: tuple[InputError, ...]
    zeros: int = 0
    digest: str | None = None
    precision: torch.dtype | None = None


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


def check_base_weights(looks: Iterable[Look], on_fault: FaultHandler) -> None:
    """Base weights are not trained, so clients that differ in them had different base models.

    They may differ by the rounding of their dtypes.
    """
    said: dict[str, list[Look]] = {}
    for look in looks:
        if look.digest is not None:
            said.setdefault(look.item.name, []).append(look)
    for name, own in said.items():
        majority, agreeing = _usual_base(own)
        decides = 2 * sum(look.digest in agreeing for look in own) > len(own)
        most = Majority(majority.digest, majority.item.adapter, decides)
        for look in own:
            if look.digest not in agreeing:
                found = f"its base weights {name} differ from the other clients'"
                cure = "start all clients from one base model"
                cure += "; name what they trained in modules_to_save"
                on_fault(most.fault(look.item.adapter.weights_file, found, cure))


def _usual_base(looks: Sequence[Look]) -> tuple[Look, set[str | None]]:
    """The base weights that agree with those of most clients, and the digests of all that agree.

    Of every precision, the numbers that most clients have are compared with all others: that is
    work for few tensors, however many different ones there are.
    """
    votes = Counter(look.digest for look in looks)
    ordered = sorted(looks, key=lambda look: -votes[look.digest])
    candidates = list({look.precision: look for look in reversed(ordered)}.values())
    agreeing = [_agreeing(candidate, looks) for candidate in candidates]
    counts = [sum(votes[digest] for digest in one) for one in agreeing]
    most = counts.index(max(counts))
    return candidates[most], agreeing[most]


def _agreeing(majority: Look, looks: Sequence[Look]) -> set[str | None]:
    """The digests of base weights that may be the same numbers. Each is read once."""
    same: dict[str | None, bool] = {majority.digest: True}
    tensor = None
    for look in looks:
        if look.digest in same:
            continue
        tensor = _read(majority) if tensor is None else tensor
        same[look.digest] = same_up_to_rounding(_read(look), tensor)
    return {digest for digest, agrees in same.items() if agrees}


def _read(look: Look) -> Tensor:
    content = look.item.content
    if not isinstance(content, FullTensor):
        raise TypeError(look.item.name)
    return content.read()


def _look(group: list[Item]) -> list[Look]:
    """What the group showed; of a fault in what experts share, the first of them tells."""
    if isinstance(group[0].content, FullTensor):
        return [_look_at_tensor(group[0], group[0].content)]
    faults: list[InputError] = []
    found: dict[str, Factors] = {}
    with catching_faults(faults.append):
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
    digest, coarsest = None, None
    with catching_faults(faults.append):
        tensor = content.read(faults.append)
        if content.role == "base":
            # Equal numbers of any dtype, as bytes: with 0.0 added, there is no -0.0.
            coarsest = precision(tensor)
            digest = hashlib.sha256((tensor.double() + 0.0).numpy().tobytes()).hexdigest()
    return Look(item, tuple(faults), digest=digest, precision=coarsest)
