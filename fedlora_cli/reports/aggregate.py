"""The report of an aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora_cli.clients.reading import LeftOut, SamplesFrom
from fedlora_cli.reports.document import AGGREGATE_SCHEMA, ON_DEMAND, document
from fedlora_cli.reports.notebook import Summary, at_risk, shown_by_summary, span, table

#: The source of the sample counts, as terminal and model card show it.
SAMPLES_SOURCE: dict[SamplesFrom, str] = {
    "operator": "sample counts: from --samples",
    "clients": "sample counts: self-reported by the clients",
    "uniform": "sample counts: unknown, so all clients have equal weight",
}


@dataclass(frozen=True)
class ClientRow:
    """A client. `weight` is its weight at the first rank index, averaged over its modules, and
    `max_weight` its largest weight at any rank index of any module. `energy` is the energy of its
    update by singular direction, summed over its modules. `norm` is ‖ΔW_k‖_F, or more if its rank
    indices cancel each other (`sizes.Sizes.reach`). `clip` is the factor of its update, and `trust`
    the factor of its sample count.
    """

    name: str
    path: str
    rank: int
    samples: float
    weight: float | None
    max_weight: float | None
    energy: tuple[float, ...]
    sha256: str | None
    norm: float | None = None
    clip: float | None = None
    trust: float | None = None


@dataclass(frozen=True)
class ModuleRow:
    """A module of the written adapter. `ranks` are the ranks of the clients in their order, 0 for a
    client that does not adapt it; `rank` counts the written directions without padding;
    `kept_energy` is the share of the weighted sum's energy that they hold.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    rank: int
    energy_ratio: float | None
    kept_energy: float | None
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class PartitionRow:
    """Rank indices first..last, counted from 1, between two ranks that occur among the clients.

    `coverage` is the share of samples of its holders, `energy` its share of the written energy,
    `max_weight` the largest weight of one client in it, `heaviest` that client.
    """

    first: int
    last: int
    holders: int
    coverage: float
    energy: float | None
    max_weight: float | None
    heaviest: str | None


@dataclass(frozen=True)
class Verification:
    """The check of the written files against the weighted sum: the largest relative Frobenius error
    of a module beyond the truncation, the allowed error, and the worst module. Tensors saved in
    full must equal the mean to the last bit.
    """

    max_error: float
    tolerance: float
    worst: str


@dataclass(frozen=True)
class RouteRow:
    """The modules of one shape and one total rank. `seconds` is an estimate for all of them on one
    core, `bytes` the working memory of one module; `others` has the estimates of the other routes,
    or the reason why a route is impossible.
    """

    modules: int
    shape: tuple[int, int]
    total_rank: int
    route: str
    seconds: float
    bytes: int
    others: Mapping[str, float | str]


@dataclass(frozen=True)
class WorkEstimate:
    """Estimates for one machine in bytes: peak `memory`, factors to `read`, files to `write`, with
    `jobs` modules at a time. `routes` is empty for methods that do not truncate. With `--energy`
    the rank is not known yet: `write` is None and `routes` is empty.
    """

    memory: int
    read: int
    write: int | None
    jobs: int
    routes: tuple[RouteRow, ...]


@shown_by_summary
@dataclass(frozen=True)
class AggregateReport:
    """One aggregation. Values that need tensors are None after a dry run.

    - `energy_ratio`, `norm`: ρ at the shared rank and ‖ΔW‖_F of the written update, with those of
      FlexLoRA on the same clients.
    - `samples_from`: the source of the sample counts: the operator, the clients, or none.
    - `left_out`: the faulty clients that do not take part.
    - `files`: the SHA-256 of every other file of the folder, by name.
    - `format`: the format of the clients and of the output.
    - `distribution`: the name and version of the distribution that an installed method comes with.
    - `work`: only for `--dry-run` and `--explain`, never saved, because it depends on the machine.
    """

    method: str
    source: str
    output: str
    base_model: str | None
    shared_rank: int
    rank: int | None
    scale: float
    dtype: str
    options: Mapping[str, Any]
    energy_ratio: float | None
    flexlora_energy_ratio: float | None
    norm: float | None
    flexlora_norm: float | None
    kept_energy: float | None
    samples_from: SamplesFrom
    clients: tuple[ClientRow, ...]
    left_out: tuple[LeftOut, ...]
    partitions: tuple[PartitionRow, ...]
    modules: tuple[ModuleRow, ...]
    tensors: tuple[str, ...]
    warnings: tuple[str, ...]
    version: str
    verification: Verification | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    format: str = "peft"
    work: WorkEstimate | None = field(default=None, metadata=ON_DEMAND)
    distribution: str | None = field(default=None, metadata=ON_DEMAND)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(AGGREGATE_SCHEMA, self)

    def _summary(self) -> Summary:
        return Summary(
            (
                ("method", self.method),
                ("clients", len(self.clients)),
                ("left out", len(self.left_out) or None),
                ("ranks", span(row.rank for row in self.clients)),
                ("shared rank", self.shared_rank),
                ("output rank", self.rank),
                ("rank at risk", at_risk(self.partitions)),
                ("ρ", self.energy_ratio),
                ("kept energy", self.kept_energy),
                ("output", self.output),
            ),
            self.warnings,
            table(
                ("client", "rank", "samples", "weight", "largest weight", "‖ΔW‖"),
                self.clients,
                lambda row: (
                    row.name, row.rank, row.samples, row.weight, row.max_weight, row.norm
                ),
            ),
        )  # fmt: skip
