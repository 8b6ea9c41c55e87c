"""What ranks and sample counts alone tell of the rounds to come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictedPartition:
    """Rank indices first..last, counted from 1. `coverage` is the share of samples of the
    `holders`; `absent` and `alone` are the probabilities that a round has none of them, and one.
    """

    first: int
    last: int
    holders: int
    coverage: float
    absent: float
    alone: float


@dataclass(frozen=True)
class MethodForecast:
    """What a method does to the energy of each rank index, in a basis that stays and without
    training.

    `column_sums` (R,) are those of the weights with all clients present, the previous adapter's
    included where the method uses it; `energy_factors` (R,) the expected factor of the energy per
    round under the participation; `gamma` the largest of them beyond the shared rank: at which
    1 - ρ decays in the end, None where nothing lies beyond. `rounds_to_90` and `rounds_to_99` are
    the first rounds in which ρ exceeds 0.9 and 0.99, None for never. `energy_ratio` is ρ by round,
    from round 0 on, of the expected energies. `weights` (P, P) are those of all clients of
    one rank together, by rank and partition, `largest_weight` is the most that one client of rank
    `heaviest_rank` gets anywhere with all present, `note` what was assumed.
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


@dataclass(frozen=True)
class PredictReport:
    """One forecast. `coverage` is by rank index; `start` is the assumed ρ of round 0.

    A round has `present` of the clients; `draws` is how many rounds the expectations are means of,
    0 where they are exact.
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
