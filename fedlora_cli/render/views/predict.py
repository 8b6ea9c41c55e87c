"""What will become of a federation, as a person reads it."""

from __future__ import annotations

from fedlora_cli.render.view import (
    Bar,
    Block,
    Column,
    Paragraph,
    Table,
    View,
    columns,
    count,
    number,
    percent,
    share,
    wrapped,
)
from fedlora_cli.reports.predict import PredictedPartition, PredictReport
from fedlora_cli.text import rank_range

#: So many partitions stand beside each other in 80 columns; of more, the first and the last do.
_BESIDE = 5

#: The place of the partitions that are left out.
_GAP = None


def predict_view(report: PredictReport, *, details: bool) -> View:
    """Partitions, methods and advice; with `details`, every method at every partition."""
    partial = report.present < len(report.ranks)
    blocks: list[Block] = [_partitions(report.partitions, partial=partial)]
    if details:
        blocks += [_details(report), _weights(report)]
    else:
        expected = ", expected" if partial else ""
        blocks += [_sums(report), _energies(report, f"Energy left after one round{expected}")]
    blocks += [_rounds(report), Paragraph(_assumptions(report))]
    blocks.append(Paragraph("\n".join(wrapped(line) for line in report.advice), "good"))
    lowest, highest = min(report.ranks), max(report.ranks)
    ranks = f"rank {lowest}" if lowest == highest else f"rank {lowest} to {highest}"
    return View(
        "predict",
        f"{count(len(report.ranks), 'client')} of {ranks}, "
        f"{report.present if partial else 'all'} of them in every round",
        tuple(blocks),
    )


def _partitions(partitions: tuple[PredictedPartition, ...], *, partial: bool) -> Table:
    rows = tuple(
        (
            rank_range(one.first, one.last),
            str(one.holders),
            percent(one.coverage),
            Bar(one.coverage),
            *((_chance(one.absent), _chance(one.alone)) if partial else ()),
        )
        for one in partitions
    )
    heads = (
        Column("rank index", "text"),
        *columns("clients", "samples"),
        Column("", "bar"),
        *(columns("absent", "alone") if partial else ()),
    )
    return Table(heads, rows)


def _sums(report: PredictReport) -> Table:
    shown = _beside(report)
    rows = tuple(
        (
            method.name,
            *(".." if one is _GAP else number(method.column_sums[one.first - 1]) for one in shown),
        )
        for method in report.methods
    )
    return Table(_heads(shown), rows, title="Column sums of the weights")


def _energies(report: PredictReport, title: str) -> Table:
    shown = _beside(report)
    rows = tuple(
        (
            method.name,
            *(
                ".." if one is _GAP else share(method.energy_factors[one.first - 1])
                for one in shown
            ),
        )
        for method in report.methods
    )
    return Table(_heads(shown), rows, title=title)


def _details(report: PredictReport) -> Table:
    rows = tuple(
        (
            method.name if one.first == 1 else "",
            rank_range(one.first, one.last),
            number(method.column_sums[one.first - 1]),
            share(method.energy_factors[one.first - 1]),
            Bar(method.energy_factors[one.first - 1]),
        )
        for method in report.methods
        for one in report.partitions
    )
    heads = (
        Column("method", "name"),
        Column("rank index", "text"),
        *columns("sum", "energy"),
        Column("left after one round", "bar"),
    )
    return Table(heads, rows, title="Column sums of the weights, energy", shown=None)


def _weights(report: PredictReport) -> Table:
    """Who decides: one row for every rank of every method."""
    shown = _beside(report)
    places = {one: j for j, one in enumerate(report.partitions)}
    rows = tuple(
        (
            method.name if k == 0 else "",
            str(rank.last),
            *(".." if one is _GAP else number(method.weights[k][places[one]]) for one in shown),
        )
        for method in report.methods
        for k, rank in enumerate(report.partitions)
    )
    ranges = (".." if one is _GAP else rank_range(one.first, one.last) for one in shown)
    heads = (Column("method", "name"), Column("of rank"), *columns(*ranges))
    return Table(heads, rows, title="Weights of all clients of one rank together", shown=None)


def _rounds(report: PredictReport) -> Table:
    rows = tuple(
        (
            method.name,
            "-" if method.gamma is None else f"{method.gamma:.3g}",
            "never" if method.rounds_to_90 is None else str(method.rounds_to_90),
            "never" if method.rounds_to_99 is None else str(method.rounds_to_99),
            number(method.largest_weight),
            str(method.heaviest_rank),
        )
        for method in report.methods
    )
    heads = columns("gamma", "to 0.9", "to 0.99", "largest weight", "of rank")
    where = rank_range(1, report.shared_rank)
    title = f"Rounds until 0.9 and 0.99 of the energy lie in rank index {where}"
    return Table((Column("method", "name"), *heads), rows, title=title)


def _assumptions(report: PredictReport) -> str:
    """What the numbers mean, and what they rest on."""
    shared = rank_range(1, report.shared_rank)
    lines = [
        f"ρ is the share of the energy in rank index {shared}, which every client holds; it starts "
        f"at {report.start:.3g}, and 1 - ρ is multiplied by gamma every round in the end. All of "
        "this in a basis that stays and without training."
    ]
    if report.present < len(report.ranks):
        lines.append("Absent, alone: the chance that a round has none of the clients, or just one.")
    if report.draws:
        lines.append(f"Expectations are means over {report.draws} drawn rounds.")
    notes: dict[str, list[str]] = {}
    for method in report.methods:
        if method.note:
            notes.setdefault(method.note, []).append(method.name)
    lines += [f"{'; '.join(names)}: {note}." for note, names in notes.items()]
    return "\n".join(wrapped(line) for line in lines)


def _beside(report: PredictReport) -> list[PredictedPartition | None]:
    """The partitions that fit beside each other."""
    parts = list(report.partitions)
    return [*parts] if len(parts) <= _BESIDE else [*parts[: _BESIDE - 2], _GAP, parts[-1]]


def _heads(shown: list[PredictedPartition | None]) -> tuple[Column, ...]:
    ranges = (".." if one is _GAP else rank_range(one.first, one.last) for one in shown)
    return (Column("method", "name"), *columns(*ranges))


def _chance(value: float) -> str:
    """A probability; how small a tiny one is does not matter.

    >>> _chance(0.0951), _chance(2e-9), _chance(0.0)
    ('9.5 %', '< 0.1 %', '0.0 %')
    """
    return "< 0.1 %" if 0 < value < 0.001 else percent(value, 1)
