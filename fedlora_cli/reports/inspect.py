"""The report of an inspection: contents, differences and faults of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlora_cli.adapters.adapter import Role
from fedlora_cli.reports.document import INSPECT_SCHEMA, document
from fedlora_cli.reports.notebook import Summary, shown_by_summary, span, table


@dataclass(frozen=True)
class ModuleGroup:
    """Modules of one adapter that differ only in their place in the model.

    `target` is the last part of their `names`, `parameters` the number of values in their factors.
    `alpha` and `scale` are NaN if the config lacks them.
    """

    target: str
    kind: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    dtype: str
    parameters: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class TensorRow:
    """A tensor that is not a factor, and its role: "saved" in full with the module `owner`, "base"
    weights, a trained "bias" or "token", a DoRA "magnitude" or a "lora_bias".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    owner: str | None


@dataclass(frozen=True)
class Origin:
    """How fedlora made an adapter: its method, and the number of clients."""

    method: str
    version: str
    clients: int
    shared_rank: int


@dataclass(frozen=True)
class InspectedAdapter:
    """The readable contents of the headers and the config of one adapter.

    `rank` is the largest rank of a module, `bytes` the size of the weights file, `samples` the
    sample count if it is known; `notes` are remarks that are not faults.
    """

    name: str
    path: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    rslora: bool
    rank: int
    parameters: int
    bytes: int | None
    samples: float | None
    modules: tuple[ModuleGroup, ...]
    tensors: tuple[TensorRow, ...]
    origin: Origin | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """A property that differs within a cohort: every value, and the adapters with it."""

    what: str
    values: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Fault:
    """A fault: where it is, what was found, what to do."""

    where: str
    found: str
    cure: str


@shown_by_summary
@dataclass(frozen=True)
class InspectReport:
    """One inspection. With `values`, every tensor was read; `faults` names each that is not finite.

    `faults` is empty exactly if `fedlora aggregate` would accept these adapters as clients, or if
    fedlora wrote all of them and none is damaged.
    """

    adapters: tuple[InspectedAdapter, ...]
    differences: tuple[Difference, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    values: bool
    version: str

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(INSPECT_SCHEMA, self)

    def _summary(self) -> Summary:
        faults = [f"{one.where}: {one.found}; {one.cure}" for one in self.faults]
        return Summary(
            (
                ("adapters", len(self.adapters)),
                ("ranks", span(row.rank for row in self.adapters)),
                ("differences", len(self.differences)),
            ),
            faults,
            table(
                ("adapter", "rank", "modules", "parameters", "samples", "base model"),
                self.adapters,
                lambda row: (
                    row.name, row.rank, sum(len(group.names) for group in row.modules),
                    row.parameters, row.samples, row.base_model,
                ),
            ),
            self.notes,
            alarm="faults",
        )  # fmt: skip
