"""What is in adapters, how they differ, and every fault in them."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.adapters.adapter import Role


@dataclass(frozen=True)
class ModuleGroup:
    """Modules of one adapter that agree in all but their place in the model.

    `target` is the last part of their names, `names` all of them in full, `parameters` the numbers
    in their factors. `alpha` and `scale` are NaN where the config does not tell.
    """

    target: str
    kind: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    dtype: str
    parameters: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class TensorRow:
    """A tensor that is not a factor, and what it is instead: saved in full with the module `owner`,
    "base" weights, a trained "bias" or "token", a DoRA "magnitude" or a "lora_bias".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    owner: str | None


@dataclass(frozen=True)
class Origin:
    """That fedlora wrote an adapter: how, and from how many clients."""

    method: str
    version: str
    clients: int
    shared_rank: int


@dataclass(frozen=True)
class InspectedAdapter:
    """What headers and config of one adapter say, as far as they can be read.

    `rank` is the largest of any module, `bytes` the size of the weights file, `samples` the count
    that was told, `notes` are remarks that are no faults.
    """

    name: str
    path: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    rslora: bool
    rank: int
    parameters: int
    bytes: int | None
    samples: float | None
    modules: tuple[ModuleGroup, ...]
    tensors: tuple[TensorRow, ...]
    origin: Origin | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """Something in which the adapters of a cohort differ: every value, and who has it."""

    what: str
    values: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Fault:
    """What is wrong: where, what was found, what to do."""

    where: str
    found: str
    cure: str


@dataclass(frozen=True)
class InspectReport:
    """One inspection. With `values`, every tensor was read and found finite or named in `faults`.

    `faults` is empty exactly where `fedlora aggregate` would take these adapters as clients, or
    where fedlora wrote all of them and none is damaged.
    """

    adapters: tuple[InspectedAdapter, ...]
    differences: tuple[Difference, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    values: bool
    version: str
