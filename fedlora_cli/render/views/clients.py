"""A cohort of clients: who holds what, who stands out, who is like whom."""

from __future__ import annotations

from itertools import combinations

from fedlora_cli.render.view import (
    Bar,
    Block,
    Column,
    Paragraph,
    Table,
    columns,
    count,
    number,
    percent,
    rho,
    share,
    wrapped,
)
from fedlora_cli.reports.diagnose import CohortFindings, DiagnoseReport, HoldingRow, Similarity
from fedlora_cli.text import rank_range

#: What the columns mean.
_MEANINGS = (
    "z: robust deviations of ln norm from the median; beyond 3.5 stands out",
    "effective: exp of the spectral entropy; cosine: with the sum of all others",
    "overlap: of singular subspaces with another's; top weight: under raflora",
)

#: Clients whose matrix of cosines fits into a terminal.
_FITTING = 10


def clients_summary(report: DiagnoseReport) -> str:
    """What it is, in a line."""
    ranks = [row.rank for row in report.adapters]
    modules = len({module.name for row in report.adapters for module in row.modules})
    span = f"ranks {min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"rank {ranks[0]}"
    return f"{len(ranks)} of {span}, {count(modules, 'module')}, shared rank {report.shared_rank}"


def clients_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """The clients, the partitions and their holders, and what follows."""
    cohort = report.cohort
    if cohort is None:
        return []
    blocks: list[Block] = [_clients(report, cohort, whole=whole), _partitions(cohort.partitions)]
    alike = cohort.similarity
    names = [row.name for row in report.adapters]
    if whole and alike is not None and len(names) <= _FITTING:
        blocks.append(_cosines(alike, names))
    lines = "\n".join(wrapped(line) for line in _lines(report, cohort))
    return [*blocks, Paragraph(lines), Paragraph("\n".join(_MEANINGS))]


def _clients(report: DiagnoseReport, cohort: CohortFindings, *, whole: bool) -> Table:
    rows = tuple(
        (
            row.name,
            str(row.rank),
            f"{row.samples:g}",
            f"{row.norm:.3g}",
            "-" if client.outlier is None else f"{client.outlier:+.1f}",
            rho(row.energy_ratio),
            number(row.effective_rank, 1),
            number(client.cosine, 2),
            number(client.overlap, 2),
        )
        for row, client in zip(report.adapters, cohort.clients, strict=True)
    )
    heads = columns("rank", "samples", "norm", "z", "ρ", "effective", "cosine", "overlap")
    return Table((Column("client", "name"), *heads), rows, shown=None if whole else 20)


def _partitions(partitions: tuple[HoldingRow, ...]) -> Table:
    rows = tuple(
        (
            rank_range(row.first, row.last),
            str(row.holders),
            percent(row.coverage),
            number(row.max_weight, 2),
            Bar(row.energy),
            share(row.energy),
        )
        for row in partitions
    )
    heads = (
        Column("rank index", "text"),
        *columns("holders", "samples", "top weight"),
        Column("energy its holders put there", "bar"),
        Column(""),
    )
    return Table(heads, rows)


def _cosines(alike: Similarity, names: list[str]) -> Table:
    numbered = [f"{k + 1}" for k in range(len(names))]
    rows = tuple(
        (f"{k} {name}", *(number(value, 2) for value in row))
        for k, name, row in zip(numbered, names, alike.cosine, strict=True)
    )
    return Table((Column("cosine", "name"), *columns(*numbered)), rows)


def _lines(report: DiagnoseReport, cohort: CohortFindings) -> list[str]:
    lines = []
    if cohort.energy_ratio is not None:
        lines.append(
            f"ρ = {rho(cohort.energy_ratio)} of the energy of the clients above rank "
            f"{report.shared_rank} lies within it"
        )
    top = max(cohort.partitions, key=lambda row: row.max_weight or 0.0)
    if top.max_weight is not None:
        lines.append(
            f"the top weight of one client under raflora is {top.max_weight:.2f}: "
            f"{top.heaviest}, in rank index {rank_range(top.first, top.last)}"
        )
    if cohort.similarity is not None:
        lines += _pairs(cohort.similarity, [row.name for row in report.adapters])
    return lines


def _pairs(alike: Similarity, names: list[str]) -> list[str]:
    """The two clients most alike, and the two least."""
    pairs = [
        (value, names[j], names[k])
        for j, k in combinations(range(len(names)), 2)
        if (value := alike.cosine[j][k]) is not None
    ]
    if len(pairs) < 2:
        return []
    (high, a, b), (low, c, d) = max(pairs), min(pairs)
    return [
        f"most alike: {a} and {b}, cosine {high:.2f}",
        f"least alike: {c} and {d}, cosine {low:.2f}",
    ]
