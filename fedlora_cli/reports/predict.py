"""The report of a forecast from ranks and sample counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedlora_cli.reports.diagnose import Verdict
from fedlora_cli.reports.document import ON_DEMAND, PREDICT_SCHEMA, document
from fedlora_cli.reports.notebook import Summary, at_risk, shown_by_summary, span, table


@dataclass(frozen=True)
class PredictedPartition:
    """Rank indices first..last, counted from 1. `coverage` is the holders' share of the samples;
    `absent` and `alone` are the probabilities that a round has none of them, and exactly one.
    """

    first: int
    last: int
    holders: int
    coverage: float
    absent: float
    alone: float


@dataclass(frozen=True)
class MethodForecast:
    """The effect of a method on the energy by rank index, in a fixed basis and without training.

    - `weights` (P, P): sums over the clients of one rank, by rank and partition, all present.
    - `column_sums` (R,): sums of the weights, with that of the previous adapter if it is used.
    - `energy_factors` (R,): the expected factor of the energy per round under the participation.
    - `gamma`: the largest factor beyond the shared rank, the decay rate of 1 - ρ in the long run;
      None if all ranks are equal.
    - `rounds_to_90`, `rounds_to_99`: the first rounds with ρ above 0.9 and 0.99, None for never.
    - `energy_ratio`: ρ of the expected energies by round, from round 0 on.
    - `largest_weight`: the largest weight of one client, all present; its rank is `heaviest_rank`.
    - `note`: the assumption behind the forecast.
    - `verdict`: in the last round of `energy_ratio`, with its `reason`: `kept` is κ beyond the rank
      `beyond`. All are None without a number of rounds, and if all ranks are equal.
    """

    name: str
    weights: tuple[tuple[float, ...], ...]
    column_sums: tuple[float, ...]
    energy_factors: tuple[float, ...]
    gamma: float | None
    rounds_to_90: int | None
    rounds_to_99: int | None
    energy_ratio: tuple[float, ...]
    largest_weight: float
    heaviest_rank: int
    note: str
    verdict: Verdict | None = field(default=None, metadata=ON_DEMAND)
    reason: str | None = field(default=None, metadata=ON_DEMAND)
    beyond: int | None = field(default=None, metadata=ON_DEMAND)
    kept: float | None = field(default=None, metadata=ON_DEMAND)


@shown_by_summary
@dataclass(frozen=True)
class PredictReport:
    """One forecast. `coverage` is by rank index; `start` is the assumed ρ of round 0.

    A round has `present` clients. Expectations are means over `draws` random rounds, or exact if
    `draws` is 0. `rounds` is the number of rounds that the forecast was asked for, if it was.
    """

    ranks: tuple[int, ...]
    samples: tuple[float, ...]
    shared_rank: int
    participation: float
    present: int
    draws: int
    start: float
    coverage: tuple[float, ...]
    partitions: tuple[PredictedPartition, ...]
    methods: tuple[MethodForecast, ...]
    advice: tuple[str, ...]
    warnings: tuple[str, ...]
    version: str
    rounds: int | None = field(default=None, metadata=ON_DEMAND)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(PREDICT_SCHEMA, self)

    def _summary(self) -> Summary:
        return Summary(
            (
                ("clients", len(self.ranks)),
                ("ranks", span(self.ranks)),
                ("shared rank", self.shared_rank),
                ("rank at risk", at_risk(self.partitions)),
                ("clients per round", self.present),
                ("methods", len(self.methods)),
            ),
            self.warnings,
            table(
                ("method", "γ", "rounds to ρ 0.9", "rounds to ρ 0.99", "largest weight", "of rank"),
                self.methods,
                lambda row: (
                    row.name, row.gamma, row.rounds_to_90, row.rounds_to_99, row.largest_weight,
                    row.heaviest_rank,
                ),
            ),
            self.advice,
        )  # fmt: skip
