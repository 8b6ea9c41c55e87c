"""By what a person judges an aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedlora_cli.render.view import (
    Bar,
    Block,
    Column,
    Paragraph,
    Table,
    View,
    columns,
    count,
    duration,
    file_size,
    number,
    percent,
)
from fedlora_cli.reports.aggregate import (
    VOUCHED,
    AggregateReport,
    ClientRow,
    ModuleRow,
    PartitionRow,
    RouteRow,
    WorkEstimate,
)
from fedlora_cli.text import rank_range


def aggregate_view(report: AggregateReport, *, modules: bool, explain: bool = False) -> View:
    """Clients, rank partitions and findings; with `modules`, one row for each; with `explain`, why
    there are no routes where there are none.
    """
    rank = "of --energy" if report.rank is None else str(report.rank)
    blocks: list[Block] = [
        _clients(report, whole=modules),
        Paragraph(VOUCHED[report.samples_from]),
        _partitions(report.partitions),
    ]
    if modules:
        blocks.append(_modules(report.modules))
    if findings := "\n".join(_findings(report)):
        blocks.append(Paragraph(findings))
    if report.work is not None:
        if explain and not report.work.routes:
            blocks.append(Paragraph(_one_way(report)))
        blocks += _work(report.work)
    return View(
        report.method,
        f"{count(len(report.clients), 'client')}, {count(len(report.modules), 'module')}, "
        f"rank {rank}, scaling {report.scale:g}, {report.dtype}",
        tuple(blocks),
    )


def _clients(report: AggregateReport, *, whole: bool) -> Table:
    """With the columns that the options have filled: `clip` is what an update was multiplied by,
    `trust` what its samples were.
    """
    more: dict[str, Callable[[ClientRow], float | None]] = {}
    if any(row.norm is not None for row in report.clients):
        more["norm"] = lambda row: row.norm
    if "--clip-norm" in report.options:
        more["clip"] = lambda row: row.clip
    if "--robust" in report.options:
        more["trust"] = lambda row: row.trust
    rows = tuple(
        (
            row.name,
            str(row.rank),
            f"{row.samples:.12g}",
            number(row.weight),
            number(row.max_weight),
            *(_short(value(row)) for value in more.values()),
        )
        for row in report.clients
    )
    heads = columns("rank", "samples", "weight", "largest weight", *more)
    return Table((Column("client", "name"), *heads), rows, shown=None if whole else 20)


def _work(work: WorkEstimate) -> list[Block]:
    """The route of every module, and what all of it takes."""
    written = "what --energy decides" if work.write is None else file_size(work.write)
    takes = Paragraph(
        f"takes about {file_size(work.memory)} of memory with {count(work.jobs, 'module')} at a "
        f"time;\n    reads {file_size(work.read)} of factors and writes {written}"
    )
    rows = tuple(
        (
            f"{row.shape[0]} x {row.shape[1]}",
            str(row.modules),
            str(row.total_rank),
            row.route,
            duration(row.seconds),
            file_size(row.bytes),
            _alternative(row),
        )
        for row in work.routes
    )
    heads = (
        Column("shape", "text"),
        *columns("modules", "ranks"),
        Column("route", "text"),
        *columns("time, all", "bytes, one"),
        Column("alternative", "text"),
    )
    return [Table(heads, rows, shown=None), takes] if rows else [takes]


def _one_way(report: AggregateReport) -> str:
    """Why modules have no choice of routes."""
    if "--energy" in report.options:
        return (
            "--energy decides the rank first: every module is decomposed by qr for it,\n"
            "    then computed by the route that is the quickest at that rank"
        )
    return f"{report.method} does not truncate: every module is computed by qr"


def _alternative(row: RouteRow) -> str:
    """The quickest other route that could be taken."""
    possible = {name: one for name, one in row.others.items() if isinstance(one, float)}
    if not possible:
        return "-"
    name = min(possible, key=lambda name: possible[name])
    return f"{name} {duration(possible[name])}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _partitions(partitions: tuple[PartitionRow, ...]) -> Table:
    rows = tuple(
        (
            rank_range(row.first, row.last),
            str(row.holders),
            percent(row.coverage),
            Bar(row.energy),
            percent(row.energy, 1),
        )
        for row in partitions
    )
    heads = (
        Column("rank index", "text"),
        *columns("clients", "samples"),
        Column("energy", "bar"),
        Column(""),
    )
    return Table(heads, rows)


def _modules(modules: tuple[ModuleRow, ...]) -> Table:
    rows = tuple(
        (
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            str(sum(rank > 0 for rank in row.ranks)),
            # After a dry run, nobody knows how many directions there are.
            "-" if row.rank == 0 and row.energy_ratio is None else str(row.rank),
            number(row.energy_ratio),
            number(row.kept_energy),
        )
        for row in modules
    )
    heads = (Column("module", "name"), Column("shape", "text"))
    return Table((*heads, *columns("clients", "rank", "ρ", "kept energy")), rows, shown=None)


def _findings(report: AggregateReport) -> list[str]:
    lines = []
    if report.energy_ratio is not None:
        shared = rank_range(1, report.shared_rank)
        line = f"ρ = {report.energy_ratio:.3f} of the energy lies in rank index {shared}, "
        line += "which every client holds"
        if report.flexlora_energy_ratio is not None and report.method != "flexlora":
            line += f";\n    flexlora on the same clients: {report.flexlora_energy_ratio:.3f}"
        lines.append(line)
    if report.norm is not None and report.flexlora_norm is not None:
        line = f"the update has norm {report.norm:.3g}"
        if report.method != "flexlora":
            line += f", {report.flexlora_norm:.3g} under flexlora"
        lines.append(line)
    if report.kept_energy is not None:
        loss = math.sqrt(max(1 - report.kept_energy, 0.0))
        lines.append(
            f"{100 * report.kept_energy:.2f} % of the energy of the weighted sum is kept at rank "
            f"{report.rank};\n    truncation moves the update by {100 * loss:.1f} % of its norm"
        )
    if report.verification is not None:
        checked = report.verification
        lines.append(
            f"verified: the files hold the weighted sum within {checked.max_error:.1e} "
            f"(allowed {checked.tolerance:.1e})"
        )
    return lines
