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
class HandedModule:
    """One module of the global adapter. `singular_values` are all that are not rounding;
    `least_kept` and `most_kept` bound the share of its energy that those hold who adapt it, None
    where nobody does or there is no energy.
    """

    name: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    least_kept: float | None
    most_kept: float | None


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
    modules: tuple[HandedModule, ...]
    warnings: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class TargetRow:
    """Modules of one last name and shape, (out, in), with their full names."""

    target: str
    shape: tuple[int, int]
    names: tuple[str, ...]


@dataclass(frozen=True)
class HeadRow:
    """A tensor that is trained in full. `drawn` says that it is not the base model's."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    drawn: bool


@dataclass(frozen=True)
class InitReport:
    """One initial adapter at every rank. `model_class` is that of transformers."""

    base_model: str
    model_class: str
    task_type: str | None
    seed: int
    output: str
    targets: tuple[TargetRow, ...]
    tensors: tuple[HeadRow, ...]
    adapters: tuple[HandoutRow, ...]
    warnings: tuple[str, ...]
    version: str
