"""The reports of `distribute` and `init`: the adapters that the clients start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlora_cli.reports.document import DISTRIBUTE_SCHEMA, INIT_SCHEMA, document
from fedlora_cli.reports.notebook import Summary, shown_by_summary, span, table


@dataclass(frozen=True)
class DistributedRow:
    """A written adapter. `rank` is the largest rank of a module; `alpha` and `scaling` are None if
    its modules differ; `bytes` is the size of its weights file.

    `kept_energy` is the share of the global adapter's energy that it holds, None for `init` and
    without any energy. `padded` of its `directions` have no energy yet and can be trained.
    """

    name: str
    path: str
    rank: int
    alpha: float | None
    scaling: float | None
    dtype: str
    modules: int
    directions: int
    padded: int
    parameters: int
    bytes: int
    kept_energy: float | None


#: The columns of an adapter in a notebook, after its name.
_COLUMNS = ("rank", "alpha", "dtype", "bytes", "kept energy")


def _cells(row: DistributedRow) -> tuple[object, ...]:
    return row.name, row.rank, row.alpha, row.dtype, row.bytes, row.kept_energy


@dataclass(frozen=True)
class DistributedModule:
    """One module of the global adapter. `singular_values` are those above rounding. The adapters
    hold between `least_kept` and `most_kept` of its energy; both are None if no adapter has the
    module or it has no energy.
    """

    name: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    least_kept: float | None
    most_kept: float | None


@shown_by_summary
@dataclass(frozen=True)
class DistributeReport:
    """The global adapter in the folder `source` and of rank `rank`, at the ranks of the clients."""

    source: str
    output: str
    base_model: str | None
    rank: int
    clients: tuple[DistributedRow, ...]
    modules: tuple[DistributedModule, ...]
    warnings: tuple[str, ...]
    version: str

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(DISTRIBUTE_SCHEMA, self)

    def _summary(self) -> Summary:
        return Summary(
            (
                ("clients", len(self.clients)),
                ("ranks", span(row.rank for row in self.clients)),
                ("global rank", self.rank),
                ("modules", len(self.modules)),
                ("output", self.output),
            ),
            self.warnings,
            table(("client", *_COLUMNS), self.clients, _cells),
        )


@dataclass(frozen=True)
class TargetRow:
    """The modules with one last name and one shape (out, in), with their full names."""

    target: str
    shape: tuple[int, int]
    names: tuple[str, ...]


@dataclass(frozen=True)
class HeadRow:
    """A tensor that is trained in full; `drawn` if it is random instead of from the base model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    drawn: bool


@shown_by_summary
@dataclass(frozen=True)
class InitReport:
    """The initial adapters, one per rank. `model_class` is the class in transformers."""

    base_model: str
    model_class: str
    task_type: str | None
    seed: int
    output: str
    targets: tuple[TargetRow, ...]
    tensors: tuple[HeadRow, ...]
    adapters: tuple[DistributedRow, ...]
    warnings: tuple[str, ...]
    version: str

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(INIT_SCHEMA, self)

    def _summary(self) -> Summary:
        return Summary(
            (
                ("adapters", len(self.adapters)),
                ("ranks", span(row.rank for row in self.adapters)),
                ("modules", sum(len(row.names) for row in self.targets)),
                ("full tensors", len(self.tensors) or None),
                ("base model", self.base_model),
                ("model class", self.model_class),
                ("seed", self.seed),
                ("output", self.output),
            ),
            self.warnings,
            table(("adapter", *_COLUMNS), self.adapters, _cells),
        )
