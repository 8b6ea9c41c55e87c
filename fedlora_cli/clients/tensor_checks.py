"""Checks of every tensor's values: values that are not finite, factors that are all zero."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.adapters.adapter import Adapter, FullTensor, Module, read_modules
from fedlora_cli.clients.majority import Majority
from fedlora_cli.errors import FaultHandler, InputError, catching_faults
from fedlora_cli.execution import engine
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.rounding import precision, same_up_to_rounding
from fedlora_cli.linalg.sizes import fault, sizes


@dataclass(frozen=True)
class Item:
    """A module or full tensor of an adapter."""

    adapter: Adapter
    name: str
    content: Module | FullTensor


@dataclass(frozen=True)
class Look:
    """The result of reading an item. `zeros` is the number of factors that are all zero; only base
    weights, which must be equal in all adapters, have `digest` and `precision`.
    """

    item: Item
    faults: tuple[InputError, ...]
    zeros: int = 0
    digest: str | None = None
    precision: torch.dtype | None = None


def look_at(adapters: Sequence[Adapter], jobs: int, progress: engine.Progress) -> list[Look]:
    """Read every tensor of these adapters on `jobs` threads; 0 is all cores. Raises nothing."""
    groups = [group for adapter in adapters for group in _groups(adapter)]
    looks = engine.run(_look, groups, jobs, progress)
    return [look for group in looks for look in group]


def _groups(adapter: Adapter) -> list[list[Item]]:
    """The items that are read together: experts that share factors, all other items alone."""
    pairs: dict[str, list[Item]] = {}
    for name, module in adapter.modules.items():
        pairs.setdefault(module.layout.pair, []).append(Item(adapter, name, module))
    tensors = ([Item(adapter, name, tensor)] for name, tensor in adapter.tensors.items())
    return [*pairs.values(), *tensors]


def check_base_weights(looks: Iterable[Look], on_fault: FaultHandler) -> None:
    """Report base weights that differ from the majority's by more than the rounding of dtypes.

    Base weights are not trained, so that such clients started from another base model.
    """
    by_name: dict[str, list[Look]] = {}
    for look in looks:
        if look.digest is not None:
            by_name.setdefault(look.item.name, []).append(look)
    for name, candidates in by_name.items():
        example, agreeing = _majority_base(candidates)
        decides = 2 * sum(look.digest in agreeing for look in candidates) > len(candidates)
        most = Majority(example.digest, example.item.adapter, decides)
        for look in candidates:
            if look.digest not in agreeing:
                found = f"its base weights {name} differ from the other clients'"
                cure = "start all clients from one base model"
                cure += "; name what they trained in modules_to_save"
                on_fault(most.fault(look.item.adapter.weights_file, found, cure))


def _majority_base(looks: Sequence[Look]) -> tuple[Look, set[str | None]]:
    """The base weights that agree with most clients, and the digests of all that agree.

    Of each precision, only the most frequent values are compared with all others, so that few
    tensors are read however many differ.
    """
    votes = Counter(look.digest for look in looks)
    ordered = sorted(looks, key=lambda look: -votes[look.digest])
    candidates = list({look.precision: look for look in reversed(ordered)}.values())
    agreeing = [_agreeing(candidate, looks) for candidate in candidates]
    counts = [sum(votes[digest] for digest in digests) for digests in agreeing]
    most = counts.index(max(counts))
    return candidates[most], agreeing[most]


def _agreeing(candidate: Look, looks: Sequence[Look]) -> set[str | None]:
    """The digests of base weights that equal the candidate up to rounding; each is read once."""
    same: dict[str | None, bool] = {candidate.digest: True}
    tensor = None
    for look in looks:
        if look.digest in same:
            continue
        tensor = _read(candidate) if tensor is None else tensor
        same[look.digest] = same_up_to_rounding(_read(look), tensor)
    return {digest for digest, agrees in same.items() if agrees}


def _read(look: Look) -> Tensor:
    content = look.item.content
    if not isinstance(content, FullTensor):
        raise TypeError(look.item.name)
    return content.read()


def _look(group: list[Item]) -> list[Look]:
    """The results of a group; the first expert has the faults of the factors they share."""
    if isinstance(group[0].content, FullTensor):
        return [_look_at_tensor(group[0], group[0].content)]
    faults: list[InputError] = []
    factors_of: dict[str, Factors] = {}
    with catching_faults(faults.append):
        factors_of = read_modules(group[0].adapter, [item.name for item in group], faults.append)
    looks = []
    for item in group:
        zeros = 0
        if item.name in factors_of:
            factors = factors_of.pop(item.name)
            zeros = sum(not factor.any() for factor in (factors.B, factors.A))
            # Without a scale, the size of the update is unknown.
            if not faults and not math.isnan(factors.scale):
                size_fault = fault(item.adapter.path, item.name, sizes([factors])[0])
                faults += [] if size_fault is None else [size_fault]
        looks.append(Look(item, tuple(faults), zeros))
        faults = []
    return looks


def _look_at_tensor(item: Item, content: FullTensor) -> Look:
    faults: list[InputError] = []
    digest, coarsest = None, None
    with catching_faults(faults.append):
        tensor = content.read(faults.append)
        if content.role == "base":
            # Equal numbers of any dtype have equal bytes; adding 0.0 turns -0.0 into 0.0.
            coarsest = precision(tensor)
            digest = hashlib.sha256((tensor.double() + 0.0).numpy().tobytes()).hexdigest()
    return Look(item, tuple(faults), digest=digest, precision=coarsest)
