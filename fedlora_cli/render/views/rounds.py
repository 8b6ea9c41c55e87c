"""A series of rounds: ρ from one to the next, its rate, and what is left."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.render.view import (
    Bar,
    Block,
    Column,
    Paragraph,
    Table,
    columns,
    count,
    number,
    rho,
    share,
)
from fedlora_cli.render.views.adapter import energy_table, modules_table, spectrum_lines
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, Trend

#: Rounds that are shown without --verbose; of more, evenly spaced ones and the last.
_SHOWN = 16


def rounds_summary(report: DiagnoseReport) -> str:
    """What it is, in a line."""
    last = report.adapters[-1]
    shared = "unknown" if report.shared_rank is None else str(report.shared_rank)
    methods = list(dict.fromkeys(method for method in report.methods if method is not None))
    by = f"of {', '.join(methods)}, " if methods else "of "
    return (
        f"{len(report.adapters)} {by}rank {last.rank}, {count(len(last.modules), 'module')}, "
        f"shared rank {shared}"
    )


def rounds_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """ρ by round, the last round's partitions and findings, and the rate."""
    last = report.adapters[-1]
    blocks: list[Block] = []
    if report.trend is None or report.shared_rank is None:
        blocks.append(_spectra(report.adapters))
    else:
        blocks.append(_rounds(report.trend, report.shared_rank, whole=whole))
    blocks.append(energy_table(last.partitions, f"the last round, {last.name}"))
    blocks.append(Paragraph("\n".join(spectrum_lines(last, report.shared_rank))))
    if whole:
        blocks.append(modules_table(last, whole=True))
    if report.trend is not None and (lines := _rates(report.trend)):
        blocks.append(Paragraph("\n".join(lines)))
    return blocks


def _rounds(trend: Trend, shared_rank: int, *, whole: bool) -> Table:
    shown = range(trend.rounds) if whole else _spread(trend.rounds)
    rows = tuple(
        (
            trend.names[t],
            rho(trend.energy_ratio[t]),
            share(trend.beyond[t]),
            share(trend.clients_beyond[t]),
            Bar(trend.kept[t]),
            share(trend.kept[t]),
        )
        for t in shown
    )
    title = f"energy beyond rank {trend.judged_rank}: global adapter, clients above it"
    if len(shown) < trend.rounds:
        title += f"; {len(shown)} of {trend.rounds} rounds"
    heads = (
        Column("round", "name"),
        *columns(f"ρ at {shared_rank}", "global", "clients"),
        Column("κ: kept of theirs", "bar"),
        Column(""),
    )
    return Table(heads, rows, title, shown=None)


def _spectra(adapters: Sequence[AdapterRow]) -> Table:
    """What can be said of rounds without a shared rank."""
    rows = tuple(
        (
            row.name,
            number(row.effective_rank, 1),
            number(row.stable_rank, 1),
            str(row.rank_99),
            f"{row.norm:.3g}",
        )
        for row in adapters
    )
    heads = columns("effective rank", "stable rank", "99 % in", "norm")
    return Table((Column("round", "name"), *heads), rows, shown=None)


def _spread(rounds: int) -> Sequence[int]:
    """Evenly spaced rounds, counted back from the last one."""
    step = -(-rounds // _SHOWN)
    return sorted(range(rounds - 1, -1, -step))


def _rates(trend: Trend) -> list[str]:
    lines = []
    if trend.gamma is not None and trend.fitted_from is not None:
        quality = "" if trend.r_squared is None else f", r² = {trend.r_squared:.3f}"
        lines.append(
            f"measured: 1 - ρ times {trend.gamma:.3f} each round (γ, fitted from "
            f"{trend.names[trend.fitted_from - 1]} on{quality})"
        )
    if trend.predicted_gamma is not None:
        lines.append(
            f"predicted: times {trend.predicted_gamma:.3f}, from ranks, samples and weights alone, "
            "without training"
        )
    return lines
