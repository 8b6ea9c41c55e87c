"""Reports as tables and bars of at most 80 columns. Names are shown as text, never as markup."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedlora_cli.errors import printable
from fedlora_cli.method import Method
from fedlora_cli.render.report import (
    AggregateReport,
    ClientRow,
    ModuleRow,
    PartitionRow,
    rank_range,
)

#: Rows of a table before the rest is counted instead of shown.
SHOWN = 20

_BAR_WIDTH = 28
_NAME_WIDTH = 36


def aggregate_view(
    report: AggregateReport, *, modules: bool, plain: bool = False
) -> RenderableType:
    """The table by which a person judges an aggregation; with `modules`, one row for each.

    `plain` draws in ASCII, for terminals that have nothing else.
    """
    parts: list[RenderableType] = [_headline(report), _clients(report.clients)]
    parts.append(_partitions(report.partitions, plain=plain))
    if modules:
        parts.append(_modules(report.modules))
    if findings := "\n".join(_findings(report)):
        parts.append(Text(findings.replace("ρ", "rho") if plain else findings))
    return Group(parts[0], *(part for block in parts[1:] for part in (Text(), block)))


def methods_view(methods: Iterable[Method]) -> RenderableType:
    """The table of methods."""
    table = _table()
    table.add_column("method", no_wrap=True)
    table.add_column("weight of client k at rank index i", no_wrap=True)
    table.add_column("source", no_wrap=True)
    for method in methods:
        name = Text(method.name, style="bold")
        table.add_row(name, Text(method.formula), Text(method.source))
        table.add_row("", Text(method.summary, style="dim"))
    return table


def _headline(report: AggregateReport) -> Text:
    rank = "of --energy" if report.rank is None else str(report.rank)
    return Text.assemble(
        (report.method, "bold"),
        f": {_count(len(report.clients), 'client')}, {_count(len(report.modules), 'module')}, "
        f"rank {rank}, scaling {report.scale:g}, {report.dtype}",
    )


def _clients(clients: tuple[ClientRow, ...]) -> Table:
    table = _table()
    table.add_column("client", no_wrap=True, max_width=_NAME_WIDTH)
    for name in ("rank", "samples", "weight", "largest weight"):
        table.add_column(name, justify="right")
    for row in clients[:SHOWN]:
        table.add_row(
            Text(printable(row.name)),
            str(row.rank),
            f"{row.samples:g}",
            _number(row.weight),
            _number(row.max_weight),
        )
    _count_rest(table, len(clients))
    return table


def _partitions(partitions: tuple[PartitionRow, ...], *, plain: bool) -> Table:
    table = _table()
    table.add_column("rank index", no_wrap=True)
    table.add_column("clients", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("energy", width=_BAR_WIDTH, no_wrap=True)
    table.add_column("", justify="right")
    for row in partitions[:SHOWN]:
        share = "-" if row.energy is None else f"{100 * row.energy:.1f} %"
        table.add_row(
            rank_range(row.first, row.last),
            str(row.holders),
            f"{100 * row.coverage:.0f} %",
            Text(_bar(row.energy, plain=plain), style="cyan"),
            share,
        )
    _count_rest(table, len(partitions))
    return table


def _modules(modules: tuple[ModuleRow, ...]) -> Table:
    table = _table()
    table.add_column("module", no_wrap=True, max_width=_NAME_WIDTH)
    table.add_column("shape", no_wrap=True)
    for name in ("clients", "rank", "ρ", "kept energy"):
        table.add_column(name, justify="right")
    for row in modules:
        table.add_row(
            Text(printable(row.name)),
            f"{row.shape[0]} x {row.shape[1]}",
            str(sum(rank > 0 for rank in row.ranks)),
            str(row.rank),
            _number(row.energy_ratio),
            _number(row.kept_energy),
        )
    return table


def _findings(report: AggregateReport) -> list[str]:
    lines = []
    if report.energy_ratio is not None:
        shared = rank_range(1, report.shared_rank)
        line = f"ρ = {report.energy_ratio:.3f} of the energy lies in rank index {shared}, "
        line += "which every client holds"
        if report.flexlora_energy_ratio is not None and report.method != "flexlora":
            line += f";\n    flexlora on the same clients: {report.flexlora_energy_ratio:.3f}"
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


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _bar(share: float | None, *, plain: bool) -> str:
    """A bar of eighths of a character; any energy at all shows as something."""
    if not share:
        return ""
    if plain:
        return "#" * max(1, round(share * _BAR_WIDTH))
    eighths = max(1, round(share * _BAR_WIDTH * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _count_rest(table: Table, number: int) -> None:
    if number > SHOWN:
        table.add_row(f"and {number - SHOWN} more")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
