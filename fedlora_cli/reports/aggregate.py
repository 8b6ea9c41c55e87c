"""What one aggregation found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora_cli.clients.reading import LeftOut, SamplesFrom

#: Who vouches for the sample counts, in words.
VOUCHED: dict[SamplesFrom, str] = {
    "operator": "samples as --samples says",
    "clients": "samples as the clients say",
    "uniform": "samples not told: all clients count the same",
}


@dataclass(frozen=True)
class ClientRow:
    """A client. `weight` is its weight at the first rank index, which everyone holds, averaged over
    its modules; `max_weight` the largest it has at any index of any module. `energy` is that of its
    own update by singular direction, pooled over its modules: what it brought to each rank index.
    `norm` is ‖ΔW_k‖_F, or more where its rank indices cancel each other (`sizes.Sizes.reach`);
    where updates were compared beforehand, `clip` is what the update was multiplied by and `trust`
    what its samples were.
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
    """A module of the written adapter. `ranks` are the clients' ranks in the order of the clients,
    0 where a client does not adapt it; `rank` counts the directions written, padding excluded;
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
    """How far the written files are from the weighted sum, beyond what truncation must cost: the
    largest relative Frobenius error of any module, and what was allowed. Tensors that are saved in
    full must be the mean to the last bit.
    """

    max_error: float
    tolerance: float
    worst: str


#: Marks a field that stands in a document only where it was asked for.
ON_DEMAND = {"on demand": True}


@dataclass(frozen=True)
class RouteRow:
    """Modules of one shape and one total rank. `seconds` are an estimate for all of them on one
    core, `bytes` the working memory of one; `others` what the other routes would take, or why they
    are none.
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
    """Estimates for one machine: peak `memory`, the factors to `read` and the files to `write`, all
    in bytes, with so many modules at a time. While `--energy` has still to decide the rank, `write`
    is None and `routes` is empty, as it is for methods that do not truncate.
    """

    memory: int
    read: int
    write: int | None
    jobs: int
    routes: tuple[RouteRow, ...]


@dataclass(frozen=True)
class AggregateReport:
    """One aggregation. Values that only tensors can tell are None after a dry run.

    `energy_ratio` is ρ at the shared rank and `norm` ‖ΔW‖_F of the written update; those of
    FlexLoRA on the same clients stand beside them. `files` is the SHA-256 of every other file of
    the folder, by name; `samples_from` says who vouches for the sample counts: a file that the
    operator gave, the clients themselves, or nobody; `left_out` are the clients that were found at
    fault and do not take part; `format` is that of the clients and of what was written; `work` is
    told by `--dry-run` and `--explain`, and never kept: it depends on the machine.
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
