"""The view of a forecast: partitions, methods, rounds until collapse, and advice."""

from __future__ import annotations

from collections.abc import Callable

from fedlora_cli.render.view import Bar, Block, Fields, Table, View, matrix, paragraphs, table
from fedlora_cli.render.wording import count, number, percent, ranks_text, rho, share
from fedlora_cli.reports.predict import MethodForecast, PredictedPartition, PredictReport
from fedlora_cli.text import rank_range

#: Partitions that fit beside each other in 80 columns.
_BESIDE = 5

#: Rounds that fit beside each other, round 0 among them.
_ROUNDS_BESIDE = 7


def predict_view(report: PredictReport, *, details: bool) -> View:
    """The forecast in tables and sentences; with `details`, every method at every partition."""
    partial = report.present < len(report.ranks)
    fields = (*_PARTITION_FIELDS, *(_CHANCE_FIELDS if partial else ()))
    blocks: list[Block] = [table(report.partitions, fields)]
    if details:
        pairs = [(method, part) for method in report.methods for part in report.partitions]
        title = "Column sums of the weights, energy"
        blocks += [table(pairs, _DETAIL_FIELDS, title, shown=None), _weights(report)]
    else:
        expected = ", expected" if partial else ""
        blocks += [
            _by_partition(report, "Column sums of the weights", _sum),
            _by_partition(report, f"Energy left after one round{expected}", _energy),
        ]
    blocks.append(_rounds(report))
    if report.rounds is not None:
        blocks.append(_every_round(report) if details else _some_rounds(report))
        if any(method.verdict for method in report.methods):
            blocks.append(_verdicts(report))
    blocks += paragraphs(_assumptions(report))
    blocks += paragraphs(report.advice, "good")
    return View(
        "predict",
        f"{count(len(report.ranks), 'client')} of {ranks_text(report.ranks)}, "
        f"{report.present if partial else 'all'} of them in every round",
        tuple(blocks),
    )


_PARTITION_FIELDS: Fields[PredictedPartition] = (
    ("rank index", "text", lambda row: _ranks(row)),
    ("clients", "number", lambda row: row.holders),
    ("samples", "number", lambda row: percent(row.coverage)),
    ("", "bar", lambda row: Bar(row.coverage)),
)

_CHANCE_FIELDS: Fields[PredictedPartition] = (
    ("absent", "number", lambda row: _chance(row.absent)),
    ("alone", "number", lambda row: _chance(row.alone)),
)


def _ranks(partition: PredictedPartition) -> str:
    return rank_range(partition.first, partition.last)


def _sum(method: MethodForecast, partition: PredictedPartition) -> str:
    return number(method.column_sums[partition.first - 1])


def _energy(method: MethodForecast, partition: PredictedPartition) -> str:
    return share(method.energy_factors[partition.first - 1])


def _by_partition(
    report: PredictReport, title: str, cell: Callable[[MethodForecast, PredictedPartition], str]
) -> Table:
    """One row per method, one column per partition."""
    names = [method.name for method in report.methods]
    cells = [_beside([cell(method, p) for p in report.partitions]) for method in report.methods]
    return matrix("method", names, _beside([_ranks(p) for p in report.partitions]), cells, title)


_DETAIL_FIELDS: Fields[tuple[MethodForecast, PredictedPartition]] = (
    ("method", "name", lambda pair: pair[0].name if pair[1].first == 1 else ""),
    ("rank index", "text", lambda pair: _ranks(pair[1])),
    ("sum", "number", lambda pair: _sum(*pair)),
    ("energy", "number", lambda pair: _energy(*pair)),
    (
        "left after one round",
        "bar",
        lambda pair: Bar(pair[0].energy_factors[pair[1].first - 1]),
    ),
)


def _weights(report: PredictReport) -> Table:
    """The weights of the clients of one rank, by method and rank."""
    rows = [(method, k) for method in report.methods for k in range(len(report.partitions))]
    names = [method.name if k == 0 else "" for method, k in rows]
    heads = ["of rank", *_beside([_ranks(part) for part in report.partitions])]
    cells = [
        [str(report.partitions[k].last), *_beside([number(w) for w in method.weights[k]])]
        for method, k in rows
    ]
    return matrix("method", names, heads, cells, "Weights of all clients of one rank together")


def _rounds(report: PredictReport) -> Table:
    where = rank_range(1, report.shared_rank)
    return table(
        report.methods,
        [
            ("method", "name", lambda method: method.name),
            ("gamma", "number", lambda method: number(method.gamma, ".3g")),
            ("to 0.9", "number", lambda method: _until(method.rounds_to_90)),
            ("to 0.99", "number", lambda method: _until(method.rounds_to_99)),
            ("largest weight", "number", lambda method: number(method.largest_weight)),
            ("of rank", "number", lambda method: method.heaviest_rank),
        ],
        title=f"Rounds until 0.9 and 0.99 of the energy lie in rank index {where}",
    )


def _course_title(report: PredictReport) -> str:
    return f"ρ by round, the share of the energy in rank index {rank_range(1, report.shared_rank)}"


def _some_rounds(report: PredictReport) -> Table:
    """ρ of every method in the rounds that fit beside each other, the first and the last always."""
    last = report.rounds or 0
    step = max(1, -(-last // (_ROUNDS_BESIDE - 1)))
    shown = [*range(0, last, step), last]
    names = [method.name for method in report.methods]
    cells = [[number(method.energy_ratio[t], ".4f") for t in shown] for method in report.methods]
    return matrix("method", names, list(map(str, shown)), cells, _course_title(report))


def _every_round(report: PredictReport) -> Table:
    """ρ of every method in every round."""
    return table(
        [(method, t) for method in report.methods for t in range(len(method.energy_ratio))],
        [
            ("method", "name", lambda pair: pair[0].name if pair[1] == 0 else ""),
            ("round", "number", lambda pair: pair[1]),
            ("ρ", "number", lambda pair: rho(pair[0].energy_ratio[pair[1]])),
            ("", "bar", lambda pair: Bar(pair[0].energy_ratio[pair[1]])),
        ],
        title=_course_title(report),
        shown=None,
    )


def _verdicts(report: PredictReport) -> Table:
    """The verdict on every method in the last round, and the share that it rests on."""
    return table(
        report.methods,
        [
            ("method", "name", lambda method: method.name),
            ("verdict", "text", lambda method: method.verdict or "-"),
            ("beyond rank", "number", lambda method: method.beyond or "-"),
            ("energy share left", "number", lambda method: share(method.kept)),
        ],
        title=f"Verdict in round {report.rounds}",
    )


def _until(rounds: int | None) -> str:
    return "never" if rounds is None else str(rounds)


def _assumptions(report: PredictReport) -> list[str]:
    """The meaning of the numbers, and the assumptions behind them."""
    shared = rank_range(1, report.shared_rank)
    lines = [
        f"ρ is the share of the energy in rank index {shared}, which every client holds. It starts "
        f"at {report.start:.3g}; in the long run, every round multiplies 1 - ρ by gamma. The "
        "forecast assumes a fixed basis and no training."
    ]
    if report.present < len(report.ranks):
        lines.append(
            "Absent, alone: the probability that a round has none or one of these clients."
        )
    if any(method.verdict for method in report.methods):
        lines.append(
            "The verdict has the thresholds of diagnose. Energy share left: κ, the energy share "
            "beyond that rank, divided by that of round 0."
        )
    if report.draws:
        lines.append(f"Expectations are means over {report.draws} random rounds.")
    notes: dict[str, list[str]] = {}
    for method in report.methods:
        if method.note:
            notes.setdefault(method.note, []).append(method.name)
    return lines + [f"{'; '.join(names)}: {note}." for note, names in notes.items()]


def _beside(cells: list[str]) -> list[str]:
    """The cells of the partitions that fit beside each other: the first ones and the last.

    >>> _beside(["1-4", "5-8"]), _beside(["1", "2", "3", "4", "5", "6"])
    (['1-4', '5-8'], ['1', '2', '3', '..', '6'])
    """
    return cells if len(cells) <= _BESIDE else [*cells[: _BESIDE - 2], "..", cells[-1]]


def _chance(value: float) -> str:
    """A probability in percent; every tiny one is "< 0.1 %".

    >>> _chance(0.0951), _chance(2e-9), _chance(0.0)
    ('9.5 %', '< 0.1 %', '0.0 %')
    """
    return "< 0.1 %" if 0 < value < 0.001 else percent(value, 1)
