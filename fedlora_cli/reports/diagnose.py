"""What a diagnosis found out: of one adapter, of a cohort of clients, of a series of rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: From good to bad; `fedlora_cli.analysis.diagnosis.verdict` says what they mean, by numbers.
Verdict = Literal["healthy", "at risk", "collapsing", "collapsed"]

#: κ at which it is collapsed, nine tenths of what the clients put there lost, and at risk.
COLLAPSED = 0.1
AT_RISK = 0.5

#: A direction that holds less than this share of its module's energy is dead: a thousandth of the
#: norm, which is what float16 rounds away.
DEAD = 1e-6

Subject = Literal["adapter", "clients", "rounds"]


@dataclass(frozen=True)
class ModuleSpectrum:
    """One module's singular values and what follows from them.

    `energy_ratio` is ρ at the shared rank, `rank_90` the smallest rank that holds 90 % of the
    energy, `dead` how many of the `rank` directions hold less than a millionth of it, `norm` is
    ‖ΔW‖_F. None: there is no energy, or no shared rank.
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
    """Rank indices first..last, counted from 1, and the share of the energy that lies there."""

    first: int
    last: int
    energy: float | None


@dataclass(frozen=True)
class AdapterRow:
    """One adapter. What is not by module pools energies by rank index over its modules first.

    `rank` is the largest of any module; `dead` is summed over modules, out of `directions`.
    `energy` is the pooled energy by rank index, in SVD order. `samples` and `share` are those of a
    client.
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
    """How a client stands among the others.

    `outlier` is the robust z of ln ‖ΔW‖: its distance from the median in units of 1.4826 times the
    median absolute deviation. `cosine` is that of its update with the sample-weighted sum of the
    others, `overlap` the mean share of its subspace that it has in common with another client's.
    `max_weight` is its largest weight anywhere under raFLoRA.
    """

    name: str
    outlier: float | None
    cosine: float | None
    overlap: float | None
    max_weight: float | None


@dataclass(frozen=True)
class HoldingRow:
    """Rank indices first..last and who holds them. `coverage` is the holders' share of the samples,
    `energy` the share of their own energy that the holders have there, averaged by samples;
    `max_weight` the largest weight of one client in it under raFLoRA, `heaviest` that client.
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
    """Between clients j and k, (K, K), in the order of the adapters.

    `cosine` is ‹ΔW_j, ΔW_k› / (‖ΔW_j‖ ‖ΔW_k‖) with all modules as one vector. `left` and `right`
    are ‖U_jᵀ U_k‖_F² / min(r_j, r_k) of the singular subspaces, averaged over the modules that both
    adapt: 1 where one contains the other, 0 where they are orthogonal. None: nothing to compare.
    """

    cosine: tuple[tuple[float | None, ...], ...]
    left: tuple[tuple[float | None, ...], ...]
    right: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class CohortFindings:
    """What only a cohort shows. `energy_ratio` is ρ of the updates of those clients that hold more
    than the shared rank, averaged by samples: what they put within it. `similarity` is None where
    it was not asked for. `copies` are names of clients with the same update.
    """

    energy_ratio: float | None
    clients: tuple[ClientFinding, ...]
    partitions: tuple[HoldingRow, ...]
    similarity: Similarity | None
    copies: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trend:
    """ρ of the global adapter over the rounds, and what became of what the clients brought.

    Lists have one entry per round. `names` are the rounds, `energy_ratio` their ρ at the shared
    rank, `clients_energy_ratio` that of the clients who hold more than it. `judged_rank` is the
    rank beyond which the verdict found most lost, `beyond` the share of the energy beyond it,
    `clients_beyond` that of the clients who hold more than it, and `kept` is κ, what is left of
    theirs (`fedlora_cli.analysis.diagnosis.verdict`). `gamma` is the factor per round of
    1 - ρ (of its odds: `fedlora_cli.analysis.diagnosis.trend`), fitted to the rounds from
    `fitted_from` on, counted from 1; `r_squared` how well it fits. `predicted_gamma` and
    `predicted_energy_ratio` follow from ranks, samples and weights alone, without training.
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
class DiagnoseReport:
    """One diagnosis. `energy_ratio` is the ρ that `--fail-above` judges: of the adapter, of the
    last round, of the clients that hold more than the shared rank. `verdict` is None where nothing
    tells what the clients had put there, `reason` why it is what it is. `methods` are those that
    made the adapters, None where nobody says.
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
    warnings: tuple[str, ...]
    version: str
