"""All methods side by side, and how far they are from each other."""

from __future__ import annotations

from fedlora_cli.render.view import (
    Block,
    Column,
    Paragraph,
    Table,
    View,
    columns,
    count,
    number,
    rho,
    share,
    wrapped,
)
from fedlora_cli.reports.compare import CompareReport, MethodRow


def compare_view(report: CompareReport) -> View:
    """The table of methods, the matrix of their distances, and those that cannot run."""
    ranks = report.ranks
    span = f"ranks {min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"rank {ranks[0]}"
    blocks: list[Block] = [_methods(report), _distances(report)]
    refused = [
        wrapped(f"{row.name} cannot run: {row.refused}") for row in report.methods if row.refused
    ]
    if refused:
        blocks.append(Paragraph("\n".join(refused), "warning"))
    return View(
        "compare",
        f"{count(len(ranks), 'client')} of {span}, {count(report.modules, 'module')}, "
        f"shared rank {report.shared_rank}",
        tuple(blocks),
    )


def _able(report: CompareReport) -> list[tuple[int, MethodRow]]:
    return [(m, row) for m, row in enumerate(report.methods) if row.refused is None]


def _methods(report: CompareReport) -> Table:
    rows = tuple(
        (
            row.name,
            str(row.rank),
            rho(row.energy_ratio),
            number(row.effective_rank, 1),
            f"{row.norm:.3g}",
            share(row.kept_energy),
            number(row.distance),
            f"{row.seconds:.2g} s",
        )
        for _, row in _able(report)
    )
    heads = columns("rank", "ρ", "effective", "norm", "kept energy", "from mean", "time")
    return Table((Column("method", "name"), *heads), rows, shown=None)


def _distances(report: CompareReport) -> Table:
    able = _able(report)
    numbered = [str(i + 1) for i in range(len(able))]
    rows = tuple(
        (f"{n} {row.name}", *(number(report.distances[m][k], 2) for k, _ in able))
        for n, (m, row) in zip(numbered, able, strict=True)
    )
    title = "distances between them, relative to the norm of the exact mean"
    return Table((Column("", "name"), *columns(*numbered)), rows, title, shown=None)
