"""The tables of a simulation: arms by rate, by quorum and momentum, by round, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora_cli.render.view import Column, Table, columns, duration, file_size, number, rho
from fedlora_cli.reports.simulate import ArmRow, Grid, SimulateReport, Spread

#: Rounds that are shown without --verbose.
_ROUNDS = 7

#: Columns of a terminal, what of them is kept for names, and the blanks between two of its own.
_WIDTH, _NAMES, _GAP = 80, 24, 2


def results_table(report: SimulateReport) -> Table:
    """Every arm at its best rate."""
    several = len(report.rates) > 1
    rows = tuple(
        (
            row.arm,
            *((f"{row.rate:g}",) if several else ()),
            _result(report, row),
            rho(row.energy_ratio.mean),
            number(row.effective_rank.mean, 1),
            number(row.gamma.mean),
            _norm(row.norm),
        )
        for row in report.best
    )
    heads = (
        *(("best lr",) if several else ()),
        *("accuracy", f"ρ at {report.shared_rank}", "effective", "γ", "‖ΔW‖"),
    )
    return Table((Column("arm", "name"), *columns(*heads)), rows, shown=None)


def rate_tables(report: SimulateReport) -> list[Table]:
    """Accuracy by arm and rate, where there are several."""
    if len(report.rates) < 2:
        return []
    tried = {(row.arm, row.rate): row for row in report.arms}

    def cell(best: ArmRow, rate: float) -> str:
        row = tried.get((best.arm, rate))
        return "-" if row is None else _result(report, row) + ("*" if row is best else "")

    cells = [[cell(row, rate) for rate in report.rates] for row in report.best]
    title = "accuracy by learning rate; *: the best of the arm by validation accuracy"
    return _matrix(title, "arm", _names(report), [f"{rate:g}" for rate in report.rates], cells)


def grid_tables(report: SimulateReport, grid: Grid) -> list[Table]:
    """Accuracy and ρ, rows by quorum and columns by momentum."""

    def table(what: str, show: Callable[[ArmRow], str]) -> list[Table]:
        cells = [["-" if arm is None else show(arm) for arm in row] for row in grid.rows]
        title = f"{what} of {grid.method} by quorum q and momentum β"
        return _matrix(title, "", names, heads, cells)

    names = [f"q = {quorum:g}" for quorum in grid.quorums]
    heads = [f"β = {momentum:g}" for momentum in grid.momenta]
    return [
        *table("accuracy", lambda arm: _result(report, arm)),
        *table(f"ρ at {report.shared_rank}", lambda arm: rho(arm.energy_ratio.mean)),
    ]


def round_tables(report: SimulateReport) -> list[Table]:
    """Accuracy by arm in some of the rounds that were scored."""
    scores = {
        row.arm: {point.round: point.accuracy.mean for point in row.rounds} for row in report.best
    }
    scored = {t for own in scores.values() for t, score in own.items() if score is not None}
    if not scored:
        return []
    shown, digits, before = _some(sorted(scored)), report.digits, report.start_accuracy.mean
    start = [] if before is None else [number(before, digits)]
    cells = [
        [*start, *(number(scores[row.arm].get(t), digits) for t in shown)] for row in report.best
    ]
    heads = [*("start" for _ in start), *map(str, shown)]
    return _matrix("accuracy by round", "arm", _names(report), heads, cells)


def course_table(report: SimulateReport, row: ArmRow) -> Table:
    """Every round of one arm."""
    rows = tuple(
        (
            str(point.round),
            accuracy(report, point.accuracy),
            rho(point.energy_ratio.mean),
            _norm(point.norm),
        )
        for point in row.rounds
    )
    heads = columns("accuracy", f"ρ at {report.shared_rank}", "‖ΔW‖")
    title = f"{row.arm}{at_rate(report, row)}, every round"
    return Table((Column("round", "text"), *heads), rows, title, shown=None)


def cost_table(arms: Sequence[ArmRow]) -> Table:
    """What a round of these arms costs."""
    rows = tuple(
        (
            row.arm,
            file_size(round(row.bytes_up)),
            file_size(round(row.bytes_down)),
            duration(row.server_seconds),
            duration(row.client_seconds),
        )
        for row in arms
    )
    heads = columns("up", "down", "server", "training")
    return Table((Column("arm", "name"), *heads), rows, "what a round costs", shown=None)


def at_rate(report: SimulateReport, row: ArmRow) -> str:
    """The rate, where there are several."""
    return f" at lr {row.rate:g}" if len(report.rates) > 1 else ""


def accuracy(report: SimulateReport, value: Spread) -> str:
    """An accuracy with its deviation."""
    return _spread(value, report.digits)


def _result(report: SimulateReport, row: ArmRow) -> str:
    if row.accuracy.mean is None and row.diverged:
        return "diverged"
    left = f" ({row.runs - len(row.diverged)} of {row.runs})" if row.diverged else ""
    return f"{accuracy(report, row.accuracy)}{left}"


def _spread(value: Spread, digits: int) -> str:
    """A mean with its deviation.

    >>> _spread(Spread(0.5912, 0.0203), 2), _spread(Spread(0.5912, None), 3)
    ('0.59 ± 0.02', '0.591')
    """
    deviation = "" if value.sd is None else f" ± {value.sd:.{digits}f}"
    return f"{number(value.mean, digits)}{deviation}"


def _norm(norm: Spread) -> str:
    return "-" if norm.mean is None else f"{norm.mean:.3g}"


def _names(report: SimulateReport) -> list[str]:
    return [row.arm for row in report.best]


def _some(rounds: Sequence[int]) -> list[int]:
    """The first, some evenly between, and the last.

    >>> _some(list(range(1, 26)))
    [1, 5, 9, 13, 17, 21, 25]
    """
    last, most = len(rounds) - 1, min(_ROUNDS, len(rounds))
    return [rounds[round(i * last / max(1, most - 1))] for i in range(most)]


def _matrix(
    title: str,
    corner: str,
    names: Sequence[str],
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
) -> list[Table]:
    """Rows by columns, in as many tables as its columns need to fit."""
    widest = max(len(text) for row in (heads, *cells) for text in row) + _GAP
    beside = max(1, (_WIDTH - min(_NAMES, max(map(len, names)))) // widest)
    return [
        Table(
            (Column(corner, "name"), *columns(*heads[first : first + beside])),
            tuple(
                (name, *row[first : first + beside]) for name, row in zip(names, cells, strict=True)
            ),
            title,
            shown=None,
        )
        for first in range(0, len(heads), beside)
    ]
