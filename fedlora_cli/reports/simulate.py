"""What a simulation found out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean and sample standard deviation, None where there is none."""

    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class RoundPoint:
    """One round of an arm over its seeds; a score is None in a round that was not scored."""

    round: int
    accuracy: Spread
    energy_ratio: Spread
    norm: Spread


@dataclass(frozen=True)
class ArmRow:
    """One arm at one learning rate, over seeds, after the last round.

    `accuracy` is that of the global adapter on the test examples, `validation` on those that rates
    are chosen by; `energy_ratio` is ρ at the smallest rank of all clients, `norm` ‖ΔW‖_F,
    `effective_rank` exp of the spectral entropy, `gamma` the factor of 1 - ρ per round fitted as
    `fedlora diagnose` does. `bytes_up` and `bytes_down` are those of all weights files of a round,
    `server_seconds` what aggregating and distributing took in a round, `client_seconds` what the
    training of a round's clients took, on average. `diverged` are rounds in which training went
    beyond any number, by seed: such runs count in no mean. `best` says that no other rate of the
    arm has a better validation accuracy. `by_seed` are the accuracies of single runs, in the order
    of the seeds, None where one diverged; without them arms cannot be compared seed by seed.
    """

    arm: str
    method: str
    quorum: float | None
    momentum: float
    rate: float
    best: bool
    runs: int
    diverged: tuple[int, ...]
    accuracy: Spread
    validation: Spread
    energy_ratio: Spread
    effective_rank: Spread
    norm: Spread
    gamma: Spread
    verdicts: tuple[str | None, ...]
    bytes_up: float
    bytes_down: float
    server_seconds: float
    client_seconds: float
    rounds: tuple[RoundPoint, ...]
    folders: tuple[str, ...]
    by_seed: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Arms of one method, each at its best rate: rows by quorum, columns by momentum."""

    method: str
    quorums: tuple[float, ...]
    momenta: tuple[float, ...]
    rows: tuple[tuple[ArmRow | None, ...], ...]


@dataclass(frozen=True)
class SimulateReport:
    """One simulation. `setting` is all that its runs share, as its options say it; `shared_rank`
    the smallest rank of all clients, `ranks` those of the clients, `present` how many take part in
    a round, `start_accuracy` that of the base model with an untrained adapter.
    """

    output: str
    task: str
    model: str
    setting: Mapping[str, Any]
    ranks: tuple[int, ...]
    shared_rank: int
    present: int
    rounds: int
    seeds: tuple[int, ...]
    train_examples: int
    test_examples: int
    start_accuracy: Spread
    arms: tuple[ArmRow, ...]
    seconds: float
    warnings: tuple[str, ...]
    version: str

    @property
    def best(self) -> tuple[ArmRow, ...]:
        """Every arm at its best rate, in the order of the arms."""
        first = {row.arm: row for row in reversed(self.arms)}
        chosen = first | {row.arm: row for row in reversed(self.arms) if row.best}
        return tuple(chosen[name] for name in dict.fromkeys(row.arm for row in self.arms))

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates, ascending."""
        return tuple(sorted({row.rate for row in self.arms}))

    @property
    def digits(self) -> int:
        """Those of an accuracy: no more than there are test examples for."""
        return 2 if self.test_examples < 1000 else 3

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Quorum × momentum, of every method that has two of each."""
        found = (_grid([row for row in self.best if row.method == name]) for name in self._methods)
        return tuple(grid for grid in found if len(grid.quorums) > 1 < len(grid.momenta))

    @property
    def _methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.arms))


def _grid(arms: Sequence[ArmRow]) -> Grid:
    """What is more than one of both: a quorum with one momentum alone is not part of a grid."""
    # Rules with a quorum have 0 where nobody says.
    cells = {(row.quorum or 0.0, row.momentum): row for row in reversed(arms)}
    quorums = _repeated(quorum for quorum, _ in cells)
    momenta = _repeated(momentum for quorum, momentum in cells if quorum in quorums)
    rows = tuple(tuple(cells.get((q, b)) for b in momenta) for q in quorums)
    return Grid(arms[0].method, quorums, momenta, rows)


def _repeated(values: Iterable[float]) -> tuple[float, ...]:
    """Those that occur more than once, ascending."""
    return tuple(sorted(value for value, times in Counter(values).items() if times > 1))
