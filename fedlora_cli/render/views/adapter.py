"""The blocks about one adapter: its energy by rank partition, and the spectra of its modules."""

from __future__ import annotations

from fedlora_cli.render.view import Bar, Block, Fields, Paragraph, Table, table
from fedlora_cli.render.wording import count, number, rho, share
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, EnergyRow
from fedlora_cli.text import rank_range


def adapter_summary(report: DiagnoseReport) -> str:
    """The headline: rank, modules and norm."""
    row = report.adapters[0]
    return f"rank {row.rank}, {count(len(row.modules), 'module')}, norm {row.norm:.3g}"


def adapter_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """The energy by partition, the spectrum in words, and the modules."""
    row = report.adapters[0]
    return [
        table(row.partitions, ENERGY_FIELDS),
        spectrum_paragraph(row, report.shared_rank),
        modules_table(row, whole=whole),
    ]


ENERGY_FIELDS: Fields[EnergyRow] = (
    ("rank index", "text", lambda row: rank_range(row.first, row.last)),
    ("energy", "bar", lambda row: Bar(row.energy)),
    ("", "number", lambda row: share(row.energy)),
)


def spectrum_paragraph(row: AdapterRow, shared_rank: int | None) -> Paragraph:
    """ρ, the ranks and the dead directions of an adapter, in sentences."""
    lines = []
    if row.energy_ratio is not None and shared_rank is not None:
        shared = rank_range(1, shared_rank)
        lines.append(f"ρ = {rho(row.energy_ratio)} of the energy lies in rank index {shared}")
    lines += [
        f"effective rank {row.effective_rank:.1f}, stable rank {row.stable_rank:.1f}; 90 % of the "
        f"energy lies in {count(row.rank_90, 'direction')},\n    95 % in {row.rank_95}, "
        f"99 % in {row.rank_99}",
        f"{row.dead} of {row.directions} directions are dead: less than a millionth of their "
        "module's energy",
    ]
    return Paragraph("\n".join(lines))


def modules_table(row: AdapterRow, *, whole: bool) -> Table:
    """The modules, those with the largest ρ or else the smallest effective rank first."""
    return table(
        sorted(
            row.modules, key=lambda module: (-(module.energy_ratio or 0), module.effective_rank)
        ),
        [
            ("module", "name", lambda module: module.name),
            ("rank", "number", lambda module: module.rank),
            ("ρ", "number", lambda module: rho(module.energy_ratio)),
            ("effective", "number", lambda module: number(module.effective_rank, ".1f")),
            ("stable", "number", lambda module: number(module.stable_rank, ".1f")),
            ("99 % in", "number", lambda module: module.rank_99),
            ("dead", "number", lambda module: module.dead),
            ("norm", "number", lambda module: number(module.norm, ".3g")),
        ],
        shown=None if whole else 12,
    )
