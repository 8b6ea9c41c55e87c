"""The clients of one round, aligned module by module. What does not fit is an error here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise

import numpy as np

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, common_ties, usual_dtype
from fedlora_cli.clients.compatibility import agreed, check_compatibility, majority
from fedlora_cli.clients.orientation import all_older, older_experts, with_one_orientation
from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.methods.weights import FloatArray, IntArray
from fedlora_cli.remote import Location
from fedlora_cli.text import shortened


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
    facts: AdapterMetadata
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)

    @cached_property
    def samples(self) -> FloatArray:
        """n_k, shape (K,)."""
        return np.array([client.samples for client in self.clients], dtype=np.float64)

    @property
    def format(self) -> str:
        """The name of the format that all clients share."""
        return self.clients[0].adapter.format

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
        """The dtype of the factors by most of the samples, as `usual_dtype` has it."""
        return usual_dtype([client.adapter.dtype for client in self.clients], self.samples.tolist())

    def subset(self, names: Collection[str]) -> Cohort:
        """The same clients with these modules and tensors alone, without remarks."""
        clients = tuple(replace(one, adapter=one.adapter.subset(names)) for one in self.clients)
        modules = {name for one in clients for name in one.adapter.modules}
        tensors = {name for one in clients for name in one.adapter.tensors}
        facts = self.facts.without_names
        return Cohort(clients, tuple(sorted(modules)), tuple(sorted(tensors)), facts, ())

    def ranks(self, module: str) -> IntArray:
        """r_k in that module, shape (K,); 0 where a client does not adapt it."""
        found = (client.adapter.modules.get(module) for client in self.clients)
        return np.array([0 if one is None else one.rank for one in found], dtype=np.int64)


def align(
    clients: Sequence[Client], base_model: str | None = None, on_fault: FaultHandler = raise_fault
) -> Cohort:
    """The cohort of these clients. `base_model` declares one base model for all of them.

    An InputError goes to `on_fault` wherever two clients have one name, shapes or base models
    disagree, or the sample counts add up to nothing.
    """
    ordered = sorted(clients, key=lambda client: client.name)
    for one, other in pairwise(ordered):
        if one.name == other.name:
            found = f"a client named {one.name}, like {one.adapter.path}"
            cure = "give every client its own folder name"
            # Nobody's fault, so not told as of a path: either may be the one that took the name.
            places: dict[Location, str | None] = {one.adapter.path: None}
            on_fault(InputError(str(other.adapter.path), found, cure, places))
    if not sum(client.samples for client in ordered) > 0:
        on_fault(InputError("samples", "all counts are zero", "give at least one client samples"))
    adapters = with_one_orientation([client.adapter for client in ordered], on_fault)
    ordered = [replace(one, adapter=own) for one, own in zip(ordered, adapters, strict=True)]
    modules = sorted({name for adapter in adapters for name in adapter.modules})
    tensors = sorted({name for adapter in adapters for name in adapter.tensors})
    check_compatibility(adapters, on_fault)
    # Of clients alone: a global adapter has none of these fields.
    agreed(adapters, "unknown_fields", "train all clients with the same configuration", on_fault)
    return Cohort(
        clients=tuple(ordered),
        modules=tuple(modules),
        tensors=tuple(tensors),
        facts=_common_facts(adapters, base_model, on_fault),
        notes=(
            *(note for adapter in adapters for note in adapter.notes),
            *_gaps(ordered),
            *_differences(adapters),
            *older_experts(adapters),
            *_told_by_few(ordered, base_model),
        ),
    )


def with_earlier(
    cohort: Cohort, earlier: Sequence[Adapter], *, base_declared: bool
) -> tuple[Cohort, list[Adapter]]:
    """The cohort and the earlier global adapters, which belong to it and to each other.

    Their base model may have another name where the user has declared one. Raises InputError.
    """
    own = [client.adapter for client in cohort.clients]
    adapters = with_one_orientation([*own, *earlier], raise_fault)
    check_compatibility(adapters, raise_fault)
    if not base_declared:
        agreed(adapters, "base_model", "give --base to declare it", raise_fault)
    clients = [
        replace(one, adapter=new) for one, new in zip(cohort.clients, adapters, strict=False)
    ]
    facts = replace(cohort.facts, old_experts=all_older(adapters))
    return replace(cohort, clients=tuple(clients), facts=facts), adapters[len(own) :]


def _common_facts(
    adapters: Sequence[Adapter], base_model: str | None, on_fault: FaultHandler
) -> AdapterMetadata:
    """What the adapters say of themselves, where they agree; a contradiction is an error."""
    facts = [adapter.facts for adapter in adapters]
    dropouts = {one.dropout for one in facts}
    classes = _model_classes(adapters)
    revision = agreed(adapters, "revision", "leave out the adapters of another revision", on_fault)
    task_type = agreed(adapters, "task_type", "leave out the adapters of another task", on_fault)
    return replace(
        majority([(adapter.facts, adapter) for adapter in adapters]).value,
        base_model=base_model
        or agreed(adapters, "base_model", "give --base to declare it", on_fault),
        revision=revision,
        task_type=task_type,
        model_class=classes.pop() if len(classes) == 1 else None,
        # Dropout is a choice of training; where clients differ, the global adapter has none.
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        # PEFT corrects this by the type of the layer; false is its default.
        fan_in_fan_out=all(one.fan_in_fan_out for one in facts),
        # Its scaling is written as alpha / r.
        rslora=False,
        old_experts=all_older(adapters),
        tied=common_ties(adapters),
    ).named_like(facts)


def _gaps(clients: Sequence[Client]) -> tuple[str, ...]:
    """A remark about every client that lacks modules or trained tensors of the others."""
    modules = sorted({name for client in clients for name in client.adapter.modules})
    tensors = sorted({name for client in clients for name in client.adapter.tensors})
    return tuple(
        f"{client.name} has no {what}: {shortened(first, total=len(everything) - len(own))}"
        for client in clients
        for what, everything, own in (
            ("factors of", modules, client.adapter.modules),
            ("tensor", tensors, client.adapter.tensors),
        )
        if len(own) < len(everything)
        # As few as are shown: one client with very many must not be gone through for all others.
        for first in ([*islice((name for name in everything if name not in own), 3)],)
    )


def _differences(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A remark about every choice of training in which the clients differ."""
    dropouts = {adapter.facts.dropout for adapter in adapters}
    orientations = {adapter.facts.fan_in_fan_out for adapter in adapters}
    classes = _model_classes(adapters)
    notes = []
    if len(classes) > 1:
        named = shortened(sorted(one.rpartition(".")[2] for one in classes))
        notes.append(
            f"the clients name different model classes ({named}); the global adapter names none, "
            "so that AutoPeftModel does not load it"
        )
    if len(dropouts) > 1:
        notes.append("the clients differ in lora_dropout; the global adapter has none")
    if len(orientations) > 1:
        notes.append("the clients differ in fan_in_fan_out; the global adapter says false")
    return tuple(notes)


def _model_classes(adapters: Sequence[Adapter]) -> set[str]:
    """The classes that adapters name for their base model; none where any of them has a task, which
    tells the class instead.
    """
    facts = [adapter.facts for adapter in adapters]
    if any(one.task_type is not None for one in facts):
        return set()
    return {one.model_class for one in facts if one.model_class is not None}


def _told_by_few(clients: Sequence[Client], base_model: str | None) -> tuple[str, ...]:
    """A remark about every fact that at most half of the clients tell and the others leave open,
    for then these decide it for all.
    """
    notes = []
    facts = ["revision", "task_type"]
    if base_model is None:
        facts.insert(0, "base_model")
    if len(_model_classes([one.adapter for one in clients])) == 1:
        facts.append("model_class")
    for fact in facts:
        told = {one.name: getattr(one.adapter.facts, fact) for one in clients}
        names = [name for name, value in told.items() if value is not None]
        if names and 2 * len(names) <= len(clients):
            says = "says its" if len(names) == 1 else "say their"
            value = str(told[names[0]])[:200]
            notes.append(f"only {shortened(names)} {says} {fact.replace('_', ' ')} is {value}")
    return tuple(notes)
