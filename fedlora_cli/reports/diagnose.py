"""The report of a diagnosis: of one adapter, of a cohort of clients, of a series of rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedlora_cli.reports.document import DIAGNOSE_SCHEMA, document
from fedlora_cli.reports.notebook import Summary, at_risk, shown_by_summary, span, table
from fedlora_cli.text import shortened

#: From good to bad; `fedlora_cli.analysis.diagnosis.verdict` defines them.
Verdict = Literal["healthy", "at risk", "collapsing", "collapsed"]

Subject = Literal["adapter", "clients", "rounds"]


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of one module, and the numbers derived from them.

    `energy_ratio` is ρ at the shared rank, None without a shared rank or any energy; `rank_90` is
    the smallest rank that holds 90 % of the energy, `dead` the number of the `rank` directions that
    hold less than a millionth of it, `norm` is ‖ΔW‖_F.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energy_ratio: float | None
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    dead: int
    norm: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class EnergyRow:
    """The share of the energy in rank indices first..last, counted from 1."""

    first: int
    last: int
    energy: float | None


@dataclass(frozen=True)
class AdapterRow:
    """One adapter. All values but those in `modules` come from `energy`: the energy by rank index,
    in SVD order, summed over the modules.

    `rank` is the largest rank of a module; `dead` of the `directions` of all modules are dead.
    `samples` and their `share` in the cohort are known for clients only.
    """

    name: str
    path: str
    rank: int
    samples: float | None
    share: float | None
    energy_ratio: float | None
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    dead: int
    directions: int
    norm: float
    energy: tuple[float, ...]
    partitions: tuple[EnergyRow, ...]
    modules: tuple[ModuleSpectrum, ...]


@dataclass(frozen=True)
class ClientFinding:
    """A client compared with the others.

    `outlier` is the robust z of ln ‖ΔW‖: its distance from the median in units of 1.4826 times the
    median absolute deviation. `cosine` is the cosine of its update with the sample-weighted sum of
    the others, `overlap` the mean share of its subspace in common with another client, `max_weight`
    its largest weight by raFLoRA at any rank index.
    """

    name: str
    outlier: float | None
    cosine: float | None
    overlap: float | None
    max_weight: float | None


@dataclass(frozen=True)
class HoldingRow:
    """Rank indices first..last and their holders. `coverage` is the holders' share of the samples,
    `energy` the share of their energy at these indices, averaged by samples; `max_weight` is the
    largest weight of one client here by raFLoRA, `heaviest` the name of that client.
    """

    first: int
    last: int
    holders: int
    coverage: float
    energy: float | None
    max_weight: float | None
    heaviest: str | None


@dataclass(frozen=True)
class Similarity:
    """The similarity of clients j and k, (K, K), in the order of the adapters.

    `cosine` is ‹ΔW_j, ΔW_k› / (‖ΔW_j‖ ‖ΔW_k‖) with all modules as one vector. `left` and `right`
    are ‖U_jᵀ U_k‖_F² / min(r_j, r_k) of the singular subspaces, averaged over the modules that both
    adapt: 1 if one contains the other, 0 if they are orthogonal. None if no module is common.
    """

    cosine: tuple[tuple[float | None, ...], ...]
    left: tuple[tuple[float | None, ...], ...]
    right: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class CohortFindings:
    """The findings about a cohort. `energy_ratio` is ρ of the clients with a rank above the shared
    rank, averaged by samples. `similarity` is None unless it was requested. `copies` are pairs of
    names of clients with the same update.
    """

    energy_ratio: float | None
    clients: tuple[ClientFinding, ...]
    partitions: tuple[HoldingRow, ...]
    similarity: Similarity | None
    copies: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trend:
    """ρ of the global adapter over the rounds, and κ: the part of the clients' energy that is left.

    Lists have one entry per round:
    - `names`, and `energy_ratio`: ρ at the shared rank;
    - `clients_energy_ratio`: ρ of the clients with a higher rank;
    - `beyond`, `clients_beyond`: the shares of energy beyond `judged_rank`, the rank of the
      verdict, in the global adapter and in the clients with a higher rank;
    - `kept`: κ by these shares (`fedlora_cli.analysis.diagnosis.verdict`).

    `gamma` is the factor per round of the odds of 1 - ρ, fitted from round `fitted_from` on,
    counted from 1, with `r_squared`. `predicted_gamma` and `predicted_energy_ratio` follow from
    ranks, samples and weights alone, without training.
    """

    rounds: int
    names: tuple[str, ...]
    energy_ratio: tuple[float | None, ...]
    clients_energy_ratio: tuple[float | None, ...]
    judged_rank: int
    beyond: tuple[float | None, ...]
    clients_beyond: tuple[float | None, ...]
    kept: tuple[float | None, ...]
    gamma: float | None
    r_squared: float | None
    fitted_from: int | None
    predicted_gamma: float | None
    predicted_energy_ratio: tuple[float | None, ...]


@dataclass(frozen=True)
class Thresholds:
    """The limits that the diagnosis applied: the κ at or below which rounds are at risk or
    collapsed, the predicted factor per round below which they are at risk, the robust z beyond
    which a client is an outlier, and the share of its module's energy below which a direction is
    dead.
    """

    at_risk: float
    collapsed: float
    rate_at_risk: float
    outlier: float
    dead: float


@shown_by_summary
@dataclass(frozen=True)
class DiagnoseReport:
    """One diagnosis. `energy_ratio` is the ρ that `--fail-above` checks: of the adapter, of the
    last round, or of the clients with a rank above the shared rank. `verdict` is None if the
    clients' energy is unknown; `reason` explains it. `methods` are the methods that made the
    adapters, None if unknown.
    """

    subject: Subject
    verdict: Verdict | None
    reason: str
    shared_rank: int | None
    energy_ratio: float | None
    adapters: tuple[AdapterRow, ...]
    methods: tuple[str | None, ...]
    cohort: CohortFindings | None
    trend: Trend | None
    thresholds: Thresholds
    warnings: tuple[str, ...]
    version: str

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(DIAGNOSE_SCHEMA, self)

    def _summary(self) -> Summary:
        cohort, trend = self.cohort, self.trend
        return Summary(
            (
                ("verdict", self.verdict or "none"),
                ("method", shortened(sorted({one for one in self.methods if one})) or None),
                (self.subject if self.subject != "adapter" else "adapters", len(self.adapters)),
                ("ranks", span(row.rank for row in self.adapters)),
                ("shared rank", self.shared_rank),
                ("rank at risk", cohort and at_risk(cohort.partitions)),
                ("ρ", self.energy_ratio),
                ("γ", trend and trend.gamma),
            ),
            self.warnings,
            table(
                ("name", "rank", "samples", "ρ", "effective rank", "‖ΔW‖"),
                self.adapters,
                lambda row: (
                    row.name, row.rank, row.samples, row.energy_ratio, row.effective_rank, row.norm
                ),
            ),
            (self.reason,) if self.reason else (),
        )  # fmt: skip
