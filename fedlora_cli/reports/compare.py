"""The report of a comparison of all methods on the same clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora_cli.reports.document import COMPARE_SCHEMA, ON_DEMAND, document
from fedlora_cli.reports.notebook import Summary, shown_by_summary, span, table


@dataclass(frozen=True)
class MethodRow:
    """One method's global update on these clients, as `fedlora aggregate` would write it.

    `energy_ratio` is ρ at the shared rank; `effective_rank` and `stable_rank` are of the energies
    summed over modules; `kept_energy` is the share of the method's weighted sum that the output
    rank holds; `distance` is ‖ΔW - M‖_F / ‖M‖_F from the exact sample-weighted mean M of the
    clients' updates; `seconds` is the time to merge and truncate on one core, without the reading
    and orthogonalizing that all methods share. `refused` is the reason why a method cannot run.
    """

    name: str
    rank: int | None
    energy_ratio: float | None
    effective_rank: float | None
    stable_rank: float | None
    norm: float | None
    kept_energy: float | None
    distance: float | None
    energy: tuple[float, ...]
    seconds: float | None
    refused: str | None


@shown_by_summary
@dataclass(frozen=True)
class CompareReport:
    """All methods side by side. `distances` (M, M) are ‖ΔW_a - ΔW_b‖_F / ‖M‖_F between the rows of
    `methods`, None if one of the two cannot run. `shared_seconds` is the time to read and
    orthogonalize, on one core. `distributions` are those of the installed methods, by method.
    """

    shared_rank: int
    ranks: tuple[int, ...]
    samples: tuple[float, ...]
    modules: int
    mean_norm: float
    methods: tuple[MethodRow, ...]
    distances: tuple[tuple[float | None, ...], ...]
    shared_seconds: float
    warnings: tuple[str, ...]
    version: str
    distributions: Mapping[str, str] | None = field(default=None, metadata=ON_DEMAND)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(COMPARE_SCHEMA, self)

    def _summary(self) -> Summary:
        return Summary(
            (
                ("methods", len(self.methods)),
                ("clients", len(self.ranks)),
                ("ranks", span(self.ranks)),
                ("shared rank", self.shared_rank),
                ("modules", self.modules),
            ),
            self.warnings,
            table(
                ("method", "rank", "ρ", "effective rank", "kept energy", "distance", "remark"),
                self.methods,
                lambda row: (
                    row.name, row.rank, row.energy_ratio, row.effective_rank, row.kept_energy,
                    row.distance, row.refused or "",
                ),
            ),
        )  # fmt: skip
