"""What was handed out to clients: from a global adapter, or at the very start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HandoutRow:
    """An adapter that was written. `rank` is the largest of any module, `alpha` and `scaling` None
    where its modules differ; `bytes` is the size of its weights file.

    `kept_energy` is the share of the global adapter's energy that it holds, None at the start and
    where there is no energy; `padded` counts its directions without energy, out of `directions`:
    they start at zero and can be trained.
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


@dataclass(frozen=True)
class DistributeReport:
    """One global adapter at every client's rank. `source` is where the global adapter is, `rank`
    its own.
    """

    source: str
    output: str
    base_model: str | None
    rank: int
    clients: tuple[HandoutRow, ...]
    warnings: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class TargetRow:
    """Modules of one name and shape, (out, in), and how many there are."""

    name: str
    shape: tuple[int, int]
    modules: int


@dataclass(frozen=True)
class InitReport:
    """One initial adapter at every rank. `model_class` is that of transformers."""

    base_model: str
    model_class: str
    task_type: str | None
    seed: int
    output: str
    targets: tuple[TargetRow, ...]
    tensors: tuple[str, ...]
    adapters: tuple[HandoutRow, ...]
    warnings: tuple[str, ...]
    version: str
