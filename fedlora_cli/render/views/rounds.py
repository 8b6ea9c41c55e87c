"""The blocks about a series of rounds: ρ and κ by round, the last round, and the rate of decay."""

from __future__ import annotations

from fedlora_cli.render.view import Bar, Block, Fields, Paragraph, Table, table
from fedlora_cli.render.views.adapter import ENERGY_FIELDS, modules_table, spectrum_paragraph
from fedlora_cli.render.wording import count, number, rho, share
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, Trend

#: Rounds that the table has without --verbose: evenly spaced, with the last round.
_SHOWN = 16


def rounds_summary(report: DiagnoseReport) -> str:
    """The headline: rounds, methods, rank and modules."""
    last = report.adapters[-1]
    methods = list(dict.fromkeys(method for method in report.methods if method is not None))
    by = f"of {', '.join(methods)}, " if methods else "of "
    return f"{len(report.adapters)} {by}rank {last.rank}, {count(len(last.modules), 'module')}"


def rounds_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """ρ by round, the partitions and the spectrum of the last round, and the rate of decay."""
    last = report.adapters[-1]
    blocks: list[Block] = []
    if report.trend is None or report.shared_rank is None:
        blocks.append(table(report.adapters, _SPECTRUM_FIELDS, shown=None))
    else:
        blocks.append(_rounds(report.trend, report.shared_rank, whole=whole))
    blocks.append(table(last.partitions, ENERGY_FIELDS, f"the last round, {last.name}"))
    blocks.append(spectrum_paragraph(last, report.shared_rank))
    if whole:
        blocks.append(modules_table(last, whole=True))
    if report.trend is not None and (lines := _rates(report.trend)):
        blocks.append(Paragraph("\n".join(lines)))
    return blocks


def _rounds(trend: Trend, shared_rank: int, *, whole: bool) -> Table:
    # Evenly spaced rounds up to the last one.
    step = 1 if whole else -(-trend.rounds // _SHOWN)
    shown = sorted(range(trend.rounds - 1, -1, -step))
    title = f"energy beyond rank {trend.judged_rank}: global adapter, clients above it"
    if len(shown) < trend.rounds:
        title += f"; {len(shown)} of {trend.rounds} rounds"
    return table(
        shown,
        [
            ("round", "name", lambda t: trend.names[t]),
            (f"ρ at {shared_rank}", "number", lambda t: rho(trend.energy_ratio[t])),
            ("global", "number", lambda t: share(trend.beyond[t])),
            ("clients", "number", lambda t: share(trend.clients_beyond[t])),
            ("κ: share kept", "bar", lambda t: Bar(trend.kept[t])),
            ("", "number", lambda t: share(trend.kept[t])),
        ],
        title,
        shown=None,
    )


_SPECTRUM_FIELDS: Fields[AdapterRow] = (
    ("round", "name", lambda row: row.name),
    ("effective rank", "number", lambda row: number(row.effective_rank, ".1f")),
    ("stable rank", "number", lambda row: number(row.stable_rank, ".1f")),
    ("99 % in", "number", lambda row: row.rank_99),
    ("norm", "number", lambda row: number(row.norm, ".3g")),
)


def _rates(trend: Trend) -> list[str]:
    lines = []
    if trend.gamma is not None and trend.fitted_from is not None:
        quality = "" if trend.r_squared is None else f", r² = {trend.r_squared:.3f}"
        lines.append(
            f"measured: each round multiplies 1 - ρ by {trend.gamma:.3f} (γ from "
            f"{trend.names[trend.fitted_from - 1]} on{quality})"
        )
    if trend.predicted_gamma is not None:
        lines.append(
            f"predicted: by {trend.predicted_gamma:.3f}, from ranks, samples and weights alone, "
            "without training"
        )
    return lines
