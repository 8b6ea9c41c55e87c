"""The blocks about one adapter: its energy by rank partition, and the spectra of its modules."""

from __future__ import annotations

from fedlora_cli.render.view import (
    Bar,
    Block,
    Paragraph,
    Table,
    count,
    number,
    rho,
    share,
    short,
    table,
)
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, EnergyRow
from fedlora_cli.text import rank_range


def adapter_summary(report: DiagnoseReport) -> str:
    """The headline: rank, modules, norm and the shared rank."""
    row = report.adapters[0]
    shared = "unknown" if report.shared_rank is None else str(report.shared_rank)
    modules = count(len(row.modules), "module")
    return f"rank {row.rank}, {modules}, norm {row.norm:.3g}, shared rank {shared}"


def adapter_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """The energy by partition, the spectrum in words, and the modules."""
    row = report.adapters[0]
    return [
        energy_table(row.partitions),
        Paragraph("\n".join(spectrum_lines(row, report.shared_rank))),
        modules_table(row, whole=whole),
    ]


def energy_table(partitions: tuple[EnergyRow, ...], title: str = "") -> Table:
    """The share of the energy in every partition."""
    return table(
        partitions,
        [
            ("rank index", "text", lambda row: rank_range(row.first, row.last)),
            ("energy", "bar", lambda row: Bar(row.energy)),
            ("", "number", lambda row: share(row.energy)),
        ],
        title,
    )


def spectrum_lines(row: AdapterRow, shared_rank: int | None) -> list[str]:
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
    return lines


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
            ("effective", "number", lambda module: number(module.effective_rank, 1)),
            ("stable", "number", lambda module: number(module.stable_rank, 1)),
            ("99 % in", "number", lambda module: module.rank_99),
            ("dead", "number", lambda module: module.dead),
            ("norm", "number", lambda module: short(module.norm)),
        ],
        shown=None if whole else 12,
    )
