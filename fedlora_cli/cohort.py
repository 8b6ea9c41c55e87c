"""The clients of one round, aligned module by module. What does not fit is an error here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from fedlora_cli.adapter import Adapter, Facts, FullTensor, Module, widest
from fedlora_cli.errors import InputError, Report, refuse
from fedlora_cli.weights import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Client:
    """One client's adapter and its number of training samples."""

    name: str
    adapter: Adapter
    samples: float


@dataclass(frozen=True, eq=False)
class Cohort:
    """Clients in the order of their names, so that the order they were given in never matters.

    `modules` and `tensors` are unions over the clients; `facts` is what all clients agree on.
    """

    clients: tuple[Client, ...]
    modules: tuple[str, ...]
    tensors: tuple[str, ...]
    facts: Facts
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)

    @cached_property
    def samples(self) -> FloatArray:
        """n_k, shape (K,)."""
        return np.array([client.samples for client in self.clients], dtype=np.float64)

    @property
    def rank(self) -> int:
        """R, the largest rank of any client."""
        return max(client.adapter.rank for client in self.clients)

    @property
    def shared_rank(self) -> int:
        """r_1, the smallest rank that a client has in a module it adapts."""
        return min(self.distinct_ranks)

    @cached_property
    def distinct_ranks(self) -> tuple[int, ...]:
        """Every rank that occurs, ascending: the upper bounds of the rank partitions."""
        modules = (module for client in self.clients for module in client.adapter.modules.values())
        return tuple(sorted({module.rank for module in modules}))

    @property
    def common_scale(self) -> float | None:
        """The scaling alpha / r that all clients share in all modules; None if they differ."""
        adapters = [client.adapter for client in self.clients]
        scales = {module.scale for adapter in adapters for module in adapter.modules.values()}
        return scales.pop() if len(scales) == 1 else None

    @property
    def dtype(self) -> str:
        """The narrowest dtype that holds the factors of all clients."""
        adapters = [client.adapter for client in self.clients]
        return widest(m.dtype for adapter in adapters for m in adapter.modules.values())

    def ranks(self, module: str) -> IntArray:
        """r_k in that module, shape (K,); 0 where a client does not adapt it."""
        found = (client.adapter.modules.get(module) for client in self.clients)
        return np.array([0 if one is None else one.rank for one in found], dtype=np.int64)


def align(
    clients: Sequence[Client], base_model: str | None = None, report: Report = refuse
) -> Cohort:
    """The cohort of these clients. `base_model` declares one base model for all of them.

    An InputError goes to `report` wherever two clients have one name, shapes or base models
    disagree, or the sample counts add up to nothing.
    """
    ordered = sorted(clients, key=lambda client: client.name)
    for one, other in pairwise(ordered):
        if one.name == other.name:
            found = f"a client named {one.name}, like {one.adapter.path}"
            cure = "give every client its own folder name"
            report(InputError(other.adapter.path, found, cure))
    if not sum(client.samples for client in ordered) > 0:
        report(InputError("samples", "all counts are zero", "give at least one client samples"))
    adapters = [client.adapter for client in ordered]
    modules = _first_holders(adapters)
    tensors = sorted({name for adapter in adapters for name in adapter.tensors})
    for adapter in adapters:
        _check_modules(modules, adapter, report)
    _check_tensors(adapters, report)
    return Cohort(
        clients=tuple(ordered),
        modules=tuple(sorted(modules)),
        tensors=tuple(tensors),
        facts=_common_facts(adapters, base_model, report),
        notes=(
            *(note for adapter in adapters for note in adapter.notes),
            *_gaps(ordered),
            *_differences(adapters),
        ),
    )


def check_fit(cohort: Cohort, earlier: Sequence[Adapter], *, base_declared: bool) -> None:
    """Whether earlier global adapters belong to this cohort and to each other. Raises InputError.

    Their base model may have another name where the user has declared one.
    """
    adapters = [*(client.adapter for client in cohort.clients), *earlier]
    modules = _first_holders(adapters)
    for adapter in earlier:
        _check_modules(modules, adapter, refuse)
    _check_tensors(adapters, refuse)
    if not base_declared:
        _agreed(adapters, "base_model", "give --base to declare it", refuse)


def _first_holders(adapters: Sequence[Adapter]) -> dict[str, Adapter]:
    """For every module, the first adapter that has it."""
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name in adapter.modules:
            first.setdefault(name, adapter)
    return first


def _check_modules(first: Mapping[str, Adapter], adapter: Adapter, report: Report) -> None:
    """Shape and kind of every module as in `first`, the first adapter that has it."""
    for name, module in adapter.modules.items():
        expected = first[name].modules[name]
        if module.shape != expected.shape or module.kind != expected.kind:
            found = f"{name} is {_describe(module)}, "
            found += f"but {_describe(expected)} in {first[name].path}"
            cure = "leave out the adapters of another base model"
            report(InputError(adapter.weights_file, found, cure))


def _describe(module: Module) -> str:
    return f"{module.kind} {module.shape[0]} x {module.shape[1]}"


def _check_tensors(adapters: Sequence[Adapter], report: Report) -> None:
    """Tensors of one shape and role everywhere, and none saved in full that has factors too."""
    modules = _first_holders(adapters)
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            expected = first.setdefault(name, adapter).tensors[name]
            if _role(tensor) != _role(expected):
                found = f"{name} is {_role(tensor)}, but {_role(expected)} in {first[name].path}"
                cure = "give all clients the same model and the same modules_to_save"
                report(InputError(adapter.weights_file, found, cure))
    owners = {t.owner: adapter for adapter in adapters for t in adapter.tensors.values()}
    for module, holder in modules.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            saver = owners.get(".".join(parts[:end]))
            if saver is not None:
                found = f"{module} is saved in full, but {holder.path} has LoRA factors of it"
                report(InputError(saver.weights_file, found, "train it one way everywhere"))


def _role(tensor: FullTensor) -> str:
    """What must be the same everywhere; floating dtypes may differ, as they can be averaged."""
    role = "a base weight" if tensor.owner is None else f"trained as {tensor.owner}"
    kind = "float" if "float" in tensor.dtype else tensor.dtype
    return f"{kind} of shape {list(tensor.shape)}, {role}"


def _common_facts(adapters: Sequence[Adapter], base_model: str | None, report: Report) -> Facts:
    """What the adapters say of themselves, where they agree; a contradiction is an error."""
    facts = [adapter.facts for adapter in adapters]
    dropouts = {one.dropout for one in facts}
    return Facts(
        base_model=base_model
        or _agreed(adapters, "base_model", "give --base to declare it", report),
        revision=_agreed(
            adapters, "revision", "leave out the adapters of another revision", report
        ),
        task_type=_agreed(adapters, "task_type", "leave out the adapters of another task", report),
        # Dropout is a choice of training; where clients differ, the global adapter has none.
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        # PEFT corrects this by the type of the layer; false is its default.
        fan_in_fan_out=all(one.fan_in_fan_out for one in facts),
    )


def _agreed(adapters: Sequence[Adapter], name: str, cure: str, report: Report) -> str | None:
    """The one value of a fact; adapters that do not say are not asked."""
    said = [(getattr(a.facts, name), a) for a in adapters if getattr(a.facts, name) is not None]
    for value, adapter in said:
        if value != said[0][0]:
            label = name.replace("_", " ")
            found = f"its {label} is {value[:200]}, but {said[0][0][:200]} in {said[0][1].path}"
            report(InputError(adapter.path, found, cure))
    return said[0][0] if said else None


def _gaps(clients: Sequence[Client]) -> tuple[str, ...]:
    """A remark about every client that lacks modules or trained tensors of the others."""
    modules = {name for client in clients for name in client.adapter.modules}
    tensors = {name for client in clients for name in client.adapter.tensors}
    return tuple(
        f"{client.name} has no {what}: {shortened(sorted(missing))}"
        for client in clients
        for what, missing in (
            ("factors of", modules - set(client.adapter.modules)),
            ("tensor", tensors - set(client.adapter.tensors)),
        )
        if missing
    )


def _differences(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A remark about every choice of training in which the clients differ."""
    dropouts = {adapter.facts.dropout for adapter in adapters}
    orientations = {adapter.facts.fan_in_fan_out for adapter in adapters}
    notes = []
    if len(dropouts) > 1:
        notes.append("the clients differ in lora_dropout; the global adapter has none")
    if len(orientations) > 1:
        notes.append("the clients differ in fan_in_fan_out; the global adapter says false")
    return tuple(notes)


def shortened(names: Sequence[str], shown: int = 3) -> str:
    """Names in a line, the first few of them.

    >>> shortened(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
