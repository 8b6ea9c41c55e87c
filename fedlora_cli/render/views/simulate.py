"""A simulation: what was trained, every arm at its best rate, what else was tried, and what of it
is more than noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from fedlora_cli.render.view import Block, Paragraph, Table, View, columns, count, duration, wrapped
from fedlora_cli.render.views.arms import (
    accuracy,
    cost_table,
    course_table,
    grid_tables,
    rate_tables,
    results_table,
    round_tables,
)
from fedlora_cli.render.views.findings import findings
from fedlora_cli.reports.simulate import SimulateReport
from fedlora_cli.text import rank_range


def simulate_view(report: SimulateReport, *, details: bool, warnings: bool = False) -> View:
    """The comparison; with `details`, every round and the whole setting; with `warnings`, those as
    well, for a page that is read elsewhere.
    """
    blocks: list[Block] = [Paragraph(wrapped(_trained(report))), results_table(report)]
    blocks += rate_tables(report)
    blocks += [table for grid in report.grids for table in grid_tables(report, grid)]
    blocks += round_tables(report)
    ended = [row for row in report.best if row.rounds]
    if ended:
        blocks.append(cost_table(ended))
    if details:
        blocks += [course_table(report, row) for row in ended]
        blocks.append(_setting(report.setting))
    blocks.append(Paragraph("\n".join(wrapped(line) for line in _meanings(report))))
    if warnings and report.warnings:
        blocks.append(Paragraph("\n".join(map(wrapped, report.warnings)), "warning"))
    blocks += findings(report)
    return View("simulate", _summary(report), tuple(blocks), report.output)


def _summary(report: SimulateReport) -> str:
    lowest, highest = min(report.ranks), max(report.ranks)
    span = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
    return (
        f"{report.task}, {count(len(report.ranks), 'client')} of {span}, "
        f"{count(report.rounds, 'round')}, {count(len(report.seeds), 'seed')}"
    )


def _trained(report: SimulateReport) -> str:
    part = str(report.present) if report.present < len(report.ranks) else "all"
    known = report.start_accuracy.mean is not None
    start = f", accuracy {accuracy(report, report.start_accuracy)} before training" if known else ""
    return (
        f"{report.model}: {report.train_examples:,} examples dealt out to "
        f"{count(len(report.ranks), 'client')}, {part} of them in every round; "
        f"{report.test_examples:,} to test{start}"
    )


def _meanings(report: SimulateReport) -> list[str]:
    """What the numbers are."""
    seeds, rates = len(report.seeds), len(report.rates)
    over = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    at = " at its best learning rate" if rates > 1 else ""
    runs = sum(row.runs for row in report.arms)
    return [
        f"accuracy: of the last global adapter of an arm{at} on the test examples{over}",
        f"ρ: share of its energy in rank index {rank_range(1, report.shared_rank)}, which every "
        "client holds; γ: factor of 1 - ρ per round; effective: exp of the spectral entropy",
        "up, down: weights files of all clients of a round; server: distributing and aggregating",
        f"{count(runs, 'run')}; the last call took {duration(report.seconds)}",
    ]


def _setting(setting: Mapping[str, Any]) -> Table:
    """All that the runs share."""
    rows = tuple((name, value) for name, value in _flat(setting) if value)
    return Table(columns("setting", "value", kind="name"), rows, shown=None)


def _flat(setting: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in setting.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, (list, tuple)):
            # The clients of one rank are many.
            groups = [(len(list(same)), one) for one, same in groupby(value)]
            yield name, ", ".join(f"{size}x{one}" if size > 1 else f"{one}" for size, one in groups)
        else:
            yield name, "" if value is None else str(value)
