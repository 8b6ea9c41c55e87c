"""The view of an aggregation: clients, rank partitions, findings, and the estimated cost."""

from __future__ import annotations

import math

from fedlora_cli.methods import known
from fedlora_cli.render.view import Bar, Block, Field, Fields, Paragraph, Table, View, table
from fedlora_cli.render.wording import count, duration, file_size, number, percent, shape_text
from fedlora_cli.reports.aggregate import (
    SAMPLES_SOURCE,
    AggregateReport,
    ClientRow,
    ModuleRow,
    PartitionRow,
    RouteRow,
    WorkEstimate,
)
from fedlora_cli.text import rank_range


def aggregate_view(report: AggregateReport, *, modules: bool, explain: bool = False) -> View:
    """The view of an aggregation; with `modules`, also every client and every module; with
    `explain`, also why the modules have no choice of routes.
    """
    rank = "by --energy" if report.rank is None else report.rank
    blocks: list[Block] = [
        _clients(report, whole=modules),
        Paragraph(SAMPLES_SOURCE[report.samples_from]),
        table(report.partitions, _PARTITION_FIELDS),
    ]
    if modules:
        blocks.append(table(report.modules, _MODULE_FIELDS, shown=None))
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
    """The clients, with a column for every optional value that the aggregation has computed."""
    normed = any(row.norm is not None for row in report.clients)
    optional: tuple[tuple[bool, Field[ClientRow]], ...] = (
        (normed, ("norm", "number", lambda row: number(row.norm, ".3g"))),
        ("--clip-norm" in report.options, ("clip", "number", lambda row: number(row.clip, ".3g"))),
        ("--robust" in report.options, ("trust", "number", lambda row: number(row.trust, ".3g"))),
    )
    return table(
        report.clients,
        [
            ("client", "name", lambda row: row.name),
            ("rank", "number", lambda row: row.rank),
            ("samples", "number", lambda row: f"{row.samples:.12g}"),
            ("weight", "number", lambda row: number(row.weight)),
            ("largest weight", "number", lambda row: number(row.max_weight)),
            *(field for wanted, field in optional if wanted),
        ],
        shown=None if whole else 20,
    )


def _work(work: WorkEstimate) -> list[Block]:
    """The routes of the modules, and the memory and the disk that the aggregation needs."""
    written = (
        "files of the rank that --energy decides" if work.write is None else file_size(work.write)
    )
    takes = Paragraph(
        f"takes about {file_size(work.memory)} of memory with {count(work.jobs, 'module')} at a "
        f"time;\n    reads {file_size(work.read)} of factors and writes {written}"
    )
    return [table(work.routes, _ROUTE_FIELDS, shown=None), takes] if work.routes else [takes]


def _one_way(report: AggregateReport) -> str:
    """Why the modules have no choice of routes."""
    if "--energy" in report.options:
        return (
            "--energy decides the rank first: qr decomposes every module,\n"
            "    then the fastest route at that rank computes the module"
        )
    method = known(report.method)
    if method is not None and method.compress != "none":
        return f"{report.method} needs all factors of a module at once: there is no choice"
    return f"{report.method} does not truncate: qr computes every module"


def _alternative(row: RouteRow) -> str:
    """The fastest other route that is possible."""
    possible = [(cost, name) for name, cost in row.others.items() if isinstance(cost, float)]
    if not possible:
        return "-"
    seconds, name = min(possible)
    return f"{name} {duration(seconds)}"


_ROUTE_FIELDS: Fields[RouteRow] = (
    ("shape", "text", lambda row: shape_text(row.shape)),
    ("modules", "number", lambda row: row.modules),
    ("ranks", "number", lambda row: row.total_rank),
    ("route", "text", lambda row: row.route),
    ("time, all", "number", lambda row: duration(row.seconds)),
    ("bytes, one", "number", lambda row: file_size(row.bytes)),
    ("alternative", "text", _alternative),
)

_PARTITION_FIELDS: Fields[PartitionRow] = (
    ("rank index", "text", lambda row: rank_range(row.first, row.last)),
    ("clients", "number", lambda row: row.holders),
    ("samples", "number", lambda row: percent(row.coverage)),
    ("energy", "bar", lambda row: Bar(row.energy)),
    ("", "number", lambda row: percent(row.energy, 1)),
)

_MODULE_FIELDS: Fields[ModuleRow] = (
    ("module", "name", lambda row: row.name),
    ("shape", "text", lambda row: shape_text(row.shape)),
    ("clients", "number", lambda row: sum(rank > 0 for rank in row.ranks)),
    # A dry run does not know the number of directions.
    (
        "rank",
        "number",
        lambda row: "-" if not row.rank and row.energy_ratio is None else row.rank,
    ),
    ("ρ", "number", lambda row: number(row.energy_ratio)),
    ("kept energy", "number", lambda row: number(row.kept_energy)),
)


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
            line += f"; flexlora on the same clients: {report.flexlora_norm:.3g}"
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
