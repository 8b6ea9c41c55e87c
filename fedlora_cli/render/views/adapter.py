"""One adapter: its energy by rank partition, and the spectra of its modules."""

from __future__ import annotations

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
from fedlora_cli.reports.diagnose import AdapterRow, DiagnoseReport, EnergyRow
from fedlora_cli.text import rank_range


def adapter_summary(report: DiagnoseReport) -> str:
    """What it is, in a line."""
    row = report.adapters[0]
    shared = "unknown" if report.shared_rank is None else str(report.shared_rank)
    modules = count(len(row.modules), "module")
    return f"rank {row.rank}, {modules}, norm {row.norm:.3g}, shared rank {shared}"


def adapter_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """Bars, findings, and the modules, the most concentrated first."""
    row = report.adapters[0]
    return [
        energy_table(row.partitions),
        Paragraph("\n".join(spectrum_lines(row, report.shared_rank))),
        modules_table(row, whole=whole),
    ]


def energy_table(partitions: tuple[EnergyRow, ...], title: str = "") -> Table:
    """The share of energy in every partition, as bars."""
    rows = tuple(
        (rank_range(one.first, one.last), Bar(one.energy), share(one.energy)) for one in partitions
    )
    return Table((Column("rank index", "text"), Column("energy", "bar"), Column("")), rows, title)


def spectrum_lines(row: AdapterRow, shared_rank: int | None) -> list[str]:
    """What the pooled singular values say, in words."""
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


def modules_table(row: AdapterRow, *, whole: bool, title: str = "") -> Table:
    """One row per module, by ρ where there is one, else by effective rank."""
    ordered = sorted(row.modules, key=lambda one: (-(one.energy_ratio or 0.0), one.effective_rank))
    rows = tuple(
        (
            one.name,
            str(one.rank),
            rho(one.energy_ratio),
            number(one.effective_rank, 1),
            number(one.stable_rank, 1),
            str(one.rank_99),
            str(one.dead),
            f"{one.norm:.3g}",
        )
        for one in ordered
    )
    heads = columns("rank", "ρ", "effective", "stable", "99 % in", "dead", "norm")
    return Table((Column("module", "name"), *heads), rows, title, shown=None if whole else 12)
