"""The tables of arms: results, accuracy by rate, by quorum and momentum, by round, and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora_cli.render.view import Field, Fields, Table, matrix, table
from fedlora_cli.render.wording import duration, file_size, number, rho
from fedlora_cli.reports.simulate import ArmRow, Grid, SimulateReport, Spread

#: Rounds in the table of accuracies by round.
_ROUNDS = 7

#: Characters: of a line, of the column of names, and between two columns.
_WIDTH, _NAMES, _GAP = 80, 24, 2


def results_table(report: SimulateReport) -> Table:
    """Every arm at its best rate."""
    rate: Field[ArmRow] = ("best lr", "number", lambda row: f"{row.rate:g}")
    return table(
        report.best,
        [
            ("arm", "name", lambda row: row.arm),
            *([rate] if len(report.rates) > 1 else []),
            ("accuracy", "number", lambda row: _result(report, row)),
            (f"ρ at {report.shared_rank}", "number", lambda row: rho(row.energy_ratio.mean)),
            ("effective", "number", lambda row: number(row.effective_rank.mean, ".1f")),
            ("γ", "number", lambda row: number(row.gamma.mean)),
            ("‖ΔW‖", "number", lambda row: number(row.norm.mean, ".3g")),
        ],
        shown=None,
    )


def rate_tables(report: SimulateReport) -> list[Table]:
    """Accuracy by arm and rate; empty for a single rate."""
    if len(report.rates) < 2:
        return []
    tried = {(row.arm, row.rate): row for row in report.arms}

    def cell(best: ArmRow, rate: float) -> str:
        row = tried.get((best.arm, rate))
        return "-" if row is None else _result(report, row) + ("*" if row is best else "")

    cells = [[cell(row, rate) for rate in report.rates] for row in report.best]
    title = "accuracy by learning rate; *: best validation accuracy of the arm"
    names, heads = [row.arm for row in report.best], [f"{rate:g}" for rate in report.rates]
    return _matrices(title, "arm", names, heads, cells)


def grid_tables(report: SimulateReport, grid: Grid) -> list[Table]:
    """Accuracy and ρ, rows by quorum and columns by momentum."""

    def tables(quantity: str, show: Callable[[ArmRow], str]) -> list[Table]:
        cells = [["-" if arm is None else show(arm) for arm in row] for row in grid.rows]
        title = f"{quantity} of {grid.method} by quorum q and momentum β"
        return _matrices(title, "", names, heads, cells)

    names = [f"q = {quorum:g}" for quorum in grid.quorums]
    heads = [f"β = {momentum:g}" for momentum in grid.momenta]
    return [
        *tables("accuracy", lambda arm: _result(report, arm)),
        *tables(f"ρ at {report.shared_rank}", lambda arm: rho(arm.energy_ratio.mean)),
    ]


def round_tables(report: SimulateReport) -> list[Table]:
    """Accuracy by arm in a few of the scored rounds."""
    scores = {
        row.arm: {point.round: point.accuracy.mean for point in row.rounds} for row in report.best
    }
    scored = {
        t for by_round in scores.values() for t, score in by_round.items() if score is not None
    }
    if not scored:
        return []
    shown, form = _some(sorted(scored)), f".{report.digits}f"
    start = {} if report.start_accuracy.mean is None else {"start": report.start_accuracy.mean}
    cells = [
        [number(score, form) for score in (*start.values(), *map(by_round.get, shown))]
        for by_round in scores.values()
    ]
    heads = [*start, *map(str, shown)]
    return _matrices("accuracy by round", "arm", [*scores], heads, cells)


def every_round_table(report: SimulateReport, row: ArmRow) -> Table:
    """Every round of one arm."""
    return table(
        row.rounds,
        [
            ("round", "text", lambda point: point.round),
            ("accuracy", "number", lambda point: accuracy(report, point.accuracy)),
            (f"ρ at {report.shared_rank}", "number", lambda point: rho(point.energy_ratio.mean)),
            ("‖ΔW‖", "number", lambda point: number(point.norm.mean, ".3g")),
        ],
        f"{row.arm}{at_rate(report, row)}, every round",
        shown=None,
    )


COST_FIELDS: Fields[ArmRow] = (
    ("arm", "name", lambda row: row.arm),
    ("up", "number", lambda row: file_size(round(row.bytes_up))),
    ("down", "number", lambda row: file_size(round(row.bytes_down))),
    ("server", "number", lambda row: duration(row.server_seconds)),
    ("training", "number", lambda row: duration(row.client_seconds)),
)


def at_rate(report: SimulateReport, row: ArmRow) -> str:
    """The learning rate of the arm; empty for a single rate."""
    return f" at lr {row.rate:g}" if len(report.rates) > 1 else ""


def accuracy(report: SimulateReport, value: Spread) -> str:
    """An accuracy with its standard deviation."""
    form = f".{report.digits}f"
    return number(value.mean, form) + ("" if value.sd is None else f" ± {value.sd:{form}}")


def _result(report: SimulateReport, row: ArmRow) -> str:
    if row.accuracy.mean is None and row.diverged:
        return "diverged"
    left = f" ({row.runs - len(row.diverged)} of {row.runs})" if row.diverged else ""
    return f"{accuracy(report, row.accuracy)}{left}"


def _some(rounds: Sequence[int]) -> list[int]:
    """At most seven rounds, evenly spaced from the first to the last.

    >>> _some(list(range(1, 26)))
    [1, 5, 9, 13, 17, 21, 25]
    """
    last, most = len(rounds) - 1, min(_ROUNDS, len(rounds))
    return [rounds[round(i * last / max(1, most - 1))] for i in range(most)]


def _matrices(
    title: str,
    corner: str,
    names: Sequence[str],
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
) -> list[Table]:
    """One matrix, split by columns into as many tables as fit into lines."""
    widest = max(len(text) for row in (heads, *cells) for text in row) + _GAP
    beside = max(1, (_WIDTH - min(_NAMES, max(map(len, names)))) // widest)
    parts = [slice(first, first + beside) for first in range(0, len(heads), beside)]
    return [matrix(corner, names, heads[p], [row[p] for row in cells], title) for p in parts]
