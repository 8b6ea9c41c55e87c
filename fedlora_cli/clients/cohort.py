"""The clients of a round, aligned module by module; incompatible clients are an error."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise

import numpy as np

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, common_ties
from fedlora_cli.adapters.dtypes import majority_dtype
from fedlora_cli.clients.compatibility import check_compatibility
from fedlora_cli.clients.majority import agreed, majority
from fedlora_cli.clients.orientation import common_layout, older_experts, with_one_orientation
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
    """Clients in the order of their names, so that the order of the paths does not matter.

    `modules` and `tensors` are unions over the clients; `metadata` is what they agree on.
    """

    clients: tuple[Client, ...]
    modules: tuple[str, ...]
    tensors: tuple[str, ...]
    metadata: AdapterMetadata
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
        """The name of the clients' common format."""
        return self.clients[0].adapter.format

    @property
    def rank(self) -> int:
        """R, the largest rank of any client."""
        return max(client.adapter.rank for client in self.clients)

    @property
    def shared_rank(self) -> int:
        """r_1, the smallest rank of a client in a module that it adapts."""
        return min(self.distinct_ranks)

    @cached_property
    def distinct_ranks(self) -> tuple[int, ...]:
        """All ranks of the clients, ascending: the upper bounds of the rank partitions."""
        modules = (module for client in self.clients for module in client.adapter.modules.values())
        return tuple(sorted({module.rank for module in modules}))

    @property
    def common_scale(self) -> float | None:
        """The scaling alpha / r of all clients in all modules; None if they differ."""
        adapters = [client.adapter for client in self.clients]
        scales = {module.scale for adapter in adapters for module in adapter.modules.values()}
        return scales.pop() if len(scales) == 1 else None

    @property
    def dtype(self) -> str:
        """The dtype of the factors that most samples have, by `majority_dtype`."""
        dtypes = [client.adapter.dtype for client in self.clients]
        return majority_dtype(dtypes, self.samples.tolist())

    def subset(self, names: Collection[str]) -> Cohort:
        """The clients with only these modules and tensors, without remarks."""
        clients = tuple(
            replace(client, adapter=client.adapter.subset(names)) for client in self.clients
        )
        modules = {name for client in clients for name in client.adapter.modules}
        tensors = {name for client in clients for name in client.adapter.tensors}
        metadata = self.metadata.without_names
        return Cohort(clients, tuple(sorted(modules)), tuple(sorted(tensors)), metadata, ())

    def ranks(self, module: str) -> IntArray:
        """r_k in a module, shape (K,); 0 for a client that does not adapt it."""
        adapted = [client.adapter.modules for client in self.clients]
        ranks = [modules[module].rank if module in modules else 0 for modules in adapted]
        return np.array(ranks, dtype=np.int64)


def align(
    clients: Sequence[Client], base_model: str | None = None, on_fault: FaultHandler = raise_fault
) -> Cohort:
    """The cohort of these clients. `base_model` declares the base model of all clients.

    Duplicate names, shapes or base models that disagree and sample counts that add up to zero go
    to `on_fault`.
    """
    ordered = sorted(clients, key=lambda client: client.name)
    for client, other in pairwise(ordered):
        if client.name == other.name:
            found = f"a client named {client.name}, like {client.adapter.path}"
            cure = "give every client its own folder name"
            # Either client may have copied the name: the fault names no path and no client.
            places: dict[Location, str | None] = {client.adapter.path: None}
            on_fault(InputError(str(other.adapter.path), found, cure, places))
    if not sum(client.samples for client in ordered) > 0:
        on_fault(InputError("samples", "all counts are zero", "give at least one client samples"))
    adapters = with_one_orientation([client.adapter for client in ordered], on_fault)
    ordered = _with_adapters(ordered, adapters)
    check_compatibility(adapters, on_fault)
    # Only of clients: a global adapter has no unknown fields.
    agreed(adapters, "unknown_fields", "train all clients with the same configuration", on_fault)
    return Cohort(
        clients=tuple(ordered),
        modules=tuple(sorted({name for adapter in adapters for name in adapter.modules})),
        tensors=tuple(sorted({name for adapter in adapters for name in adapter.tensors})),
        metadata=_common_metadata(adapters, base_model, on_fault),
        notes=(
            *(note for adapter in adapters for note in adapter.notes),
            *_gaps(ordered),
            *_differences(adapters),
            *older_experts(adapters),
            *_stated_by_few(ordered, base_model),
        ),
    )


def with_earlier(
    cohort: Cohort, earlier: Sequence[Adapter], *, base_declared: bool
) -> tuple[Cohort, list[Adapter]]:
    """The cohort and the earlier global adapters in one orientation, checked for compatibility.

    With a declared base model, its names in the files may differ. Raises InputError.
    """
    if not earlier:
        return cohort, []
    uploads = (client.adapter for client in cohort.clients)
    adapters = with_one_orientation([*uploads, *earlier], raise_fault)
    check_compatibility(adapters, raise_fault)
    if not base_declared:
        agreed(adapters, "base_model", "give --base to declare it", raise_fault)
    number = len(cohort.clients)
    clients = tuple(_with_adapters(cohort.clients, adapters[:number]))
    metadata = replace(cohort.metadata, expert_layout=common_layout(adapters))
    return replace(cohort, clients=clients, metadata=metadata), adapters[number:]


def _with_adapters(clients: Sequence[Client], adapters: Sequence[Adapter]) -> list[Client]:
    pairs = zip(clients, adapters, strict=True)
    return [replace(client, adapter=adapter) for client, adapter in pairs]


def _common_metadata(
    adapters: Sequence[Adapter], base_model: str | None, on_fault: FaultHandler
) -> AdapterMetadata:
    """The metadata that the adapters agree on; a contradiction is a fault."""
    every = [adapter.metadata for adapter in adapters]
    dropouts = {metadata.dropout for metadata in every}
    classes = _model_classes(adapters)
    revision = agreed(adapters, "revision", "leave out the adapters of another revision", on_fault)
    task_type = agreed(adapters, "task_type", "leave out the adapters of another task", on_fault)
    return replace(
        majority([(adapter.metadata, adapter) for adapter in adapters]).value,
        base_model=base_model
        or agreed(adapters, "base_model", "give --base to declare it", on_fault),
        revision=revision,
        task_type=task_type,
        model_class=classes.pop() if len(classes) == 1 else None,
        # Dropout affects training alone; if clients differ, the global adapter has none.
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        # PEFT corrects this by the type of the layer; false is its default.
        fan_in_fan_out=all(metadata.fan_in_fan_out for metadata in every),
        # The global adapter scales by alpha / r.
        rslora=False,
        expert_layout=common_layout(adapters),
        tied=common_ties(adapters),
    ).named_like(every)


def _gaps(clients: Sequence[Client]) -> tuple[str, ...]:
    """A remark about each client without some modules or trained tensors of the others."""
    modules = sorted({name for client in clients for name in client.adapter.modules})
    tensors = sorted({name for client in clients for name in client.adapter.tensors})
    return tuple(
        f"{client.name} has no {kind}: {shortened(first, total=len(everything) - len(present))}"
        for client in clients
        for kind, everything, present in (
            ("factors of", modules, client.adapter.modules),
            ("tensor", tensors, client.adapter.tensors),
        )
        if len(present) < len(everything)
        # Only the names that are shown: a client may have very many more than the others.
        for first in ([*islice((name for name in everything if name not in present), 3)],)
    )


def _differences(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A remark about each training option in which the clients differ."""
    dropouts = {adapter.metadata.dropout for adapter in adapters}
    orientations = {adapter.metadata.fan_in_fan_out for adapter in adapters}
    classes = _model_classes(adapters)
    named = shortened(sorted(name.rpartition(".")[2] for name in classes))
    notes: dict[str, Sized] = {
        f"the clients name different model classes ({named}); the global adapter names none, so "
        "AutoPeftModel cannot load it": classes,
        "the clients differ in lora_dropout; the global adapter has none": dropouts,
        "the clients differ in fan_in_fan_out; the global adapter has false": orientations,
    }
    return tuple(note for note, values in notes.items() if len(values) > 1)


def _model_classes(adapters: Sequence[Adapter]) -> set[str]:
    """The model classes in the adapters' configs; none if a config has a task, which implies the
    class.
    """
    every = [adapter.metadata for adapter in adapters]
    if any(metadata.task_type is not None for metadata in every):
        return set()
    return {metadata.model_class for metadata in every if metadata.model_class is not None}


def _stated_by_few(clients: Sequence[Client], base_model: str | None) -> tuple[str, ...]:
    """A remark about each metadata field that a minority has and thereby decides for all."""
    notes = []
    fields = ["revision", "task_type"]
    if base_model is None:
        fields.insert(0, "base_model")
    if len(_model_classes([client.adapter for client in clients])) == 1:
        fields.append("model_class")
    for field in fields:
        values = {client.name: getattr(client.adapter.metadata, field) for client in clients}
        names = [name for name, value in values.items() if value is not None]
        if names and 2 * len(names) <= len(clients):
            verb = "states" if len(names) == 1 else "state"
            value = str(values[names[0]])[:200]
            notes.append(f"only {shortened(names)} {verb} the {field.replace('_', ' ')}: {value}")
    return tuple(notes)
