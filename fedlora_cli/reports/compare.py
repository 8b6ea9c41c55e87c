"""The report of a comparison of all methods on the same clients."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class CompareReport:
    """All methods side by side. `distances` (M, M) are ‖ΔW_a - ΔW_b‖_F / ‖M‖_F between the rows of
    `methods`, None if one of the two cannot run. `shared_seconds` is the time to read and
    orthogonalize, on one core.
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
