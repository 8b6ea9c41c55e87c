"""The report of a simulation: every arm at every learning rate, over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_cli.reports.document import ON_DEMAND, SIMULATE_SCHEMA, document
from fedlora_cli.reports.notebook import Summary, shown_by_summary, span, table


@dataclass(frozen=True)
class Spread:
    """The mean and the sample standard deviation of a number over seeds, None if unknown."""

    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class RoundPoint:
    """One round of an arm over its seeds; the accuracy of a round without scoring is None."""

    round: int
    accuracy: Spread
    energy_ratio: Spread
    norm: Spread


@dataclass(frozen=True)
class ArmRow:
    """One arm at one learning rate, over seeds, after the last round.

    - `accuracy`, `validation`: of the global adapter on the test and on the validation examples;
      `best` marks the rate of the arm with the best validation accuracy.
    - `energy_ratio`: ρ at the smallest rank of all clients; `norm`: ‖ΔW‖_F; `effective_rank`: exp
      of the spectral entropy; `gamma`: factor of 1 - ρ per round, fitted as in `fedlora diagnose`.
    - `bytes_up`, `bytes_down`: all weights files of a round; `server_seconds`: aggregating and
      distributing; `client_seconds`: training of the clients; all are means over the rounds.
    - `diverged`: by diverged run, the round in which its training diverged; means leave it out.
    - `by_seed`: the accuracy of each run in the order of the seeds, None if it diverged.
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
class Lead:
    """The best arm compared with the second. `points` is the difference of their accuracies as a
    share, `margin` the 95 % margin of that difference, None for fewer than three `seeds` that both
    arms have finished. The lead is `significant` if it exceeds the margin.
    """

    first: str
    second: str
    points: float
    margin: float | None
    seeds: int
    significant: bool


@dataclass(frozen=True)
class Grid:
    """The arms of one method at their best rates: rows by quorum, columns by momentum."""

    method: str
    quorums: tuple[float, ...]
    momenta: tuple[float, ...]
    rows: tuple[tuple[ArmRow | None, ...], ...]


@dataclass(frozen=True)
class RoundRow:
    """One round of one run: a row of `fedlora simulate --csv`. A diverged round has no numbers.

    - `clients`: the number of clients in the round; `loss`: their mean training loss.
    - `validation_accuracy`, `accuracy`: shares, None in a round without a score.
    - `energy_ratio`, `norm`, the bytes and the seconds are as in `ArmRow`.
    """

    arm: str
    method: str
    quorum: float | None
    momentum: float
    learning_rate: float
    seed: int
    round: int
    clients: int
    diverged: bool
    loss: float | None
    validation_accuracy: float | None
    accuracy: float | None
    energy_ratio: float | None
    norm: float | None
    bytes_up: int | None
    bytes_down: int | None
    client_seconds: float | None
    server_seconds: float | None


@dataclass(frozen=True)
class SimulatedClient:
    """A client whose rows the data fix: its name, its rank and its number of training examples."""

    name: str
    rank: int
    samples: int


@shown_by_summary
@dataclass(frozen=True)
class SimulateReport:
    """One simulation. `setting` has the options that all runs share; `ranks` are those of the
    clients, `shared_rank` is the smallest of them; `present` clients take part in a round;
    `start_accuracy` is that of the base model with an untrained adapter. `lead` compares the best
    two arms; a document has it only if there are two. `clients` are known if the data fix them.
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
    lead: Lead | None = field(default=None, metadata=ON_DEMAND)
    clients: tuple[SimulatedClient, ...] | None = field(default=None, metadata=ON_DEMAND)
    distributions: Mapping[str, str] | None = field(default=None, metadata=ON_DEMAND)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, as plain values."""
        return document(SIMULATE_SCHEMA, self)

    def _summary(self) -> Summary:
        lead = self.lead
        return Summary(
            (
                ("task", self.task),
                ("clients", len(self.ranks)),
                ("ranks", span(self.ranks)),
                ("rounds", self.rounds),
                ("seeds", len(self.seeds)),
                ("arms", len(self.best)),
                ("best arm", lead and lead.first),
                ("lead", lead and ("significant" if lead.significant else "not significant")),
                ("output", self.output),
            ),
            self.warnings,
            table(
                ("arm", "rate", "accuracy", "sd", "ρ", "verdicts"),
                self.best,
                lambda row: (
                    row.arm, row.rate, row.accuracy.mean, row.accuracy.sd, row.energy_ratio.mean,
                    ", ".join(dict.fromkeys(verdict or "none" for verdict in row.verdicts)),
                ),
            ),
        )  # fmt: skip

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
        """The digits of an accuracy that the number of test examples supports."""
        return 2 if self.test_examples < 1000 else 3

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grid of every method with at least two quorums and two momenta."""
        methods = dict.fromkeys(row.method for row in self.arms)
        grids = (_grid([row for row in self.best if row.method == name]) for name in methods)
        return tuple(grid for grid in grids if len(grid.quorums) > 1 < len(grid.momenta))


def _grid(arms: Sequence[ArmRow]) -> Grid:
    """The grid of the quorums and momenta that occur more than once."""
    # The default quorum is 0.
    cells = {(row.quorum or 0.0, row.momentum): row for row in reversed(arms)}
    quorums = _repeated(quorum for quorum, _ in cells)
    momenta = _repeated(momentum for quorum, momentum in cells if quorum in quorums)
    rows = tuple(tuple(cells.get((q, b)) for b in momenta) for q in quorums)
    return Grid(arms[0].method, quorums, momenta, rows)


def _repeated(values: Iterable[float]) -> tuple[float, ...]:
    """The values that occur more than once, ascending."""
    return tuple(sorted(value for value, times in Counter(values).items() if times > 1))
