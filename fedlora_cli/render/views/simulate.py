"""The view of a simulation: the training, every arm at its best rate, and the findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from fedlora_cli.render.view import (
    Block,
    Paragraph,
    Table,
    View,
    count,
    duration,
    ranks_text,
    table,
    wrapped,
)
from fedlora_cli.render.views.arms import (
    accuracy,
    cost_table,
    every_round_table,
    grid_tables,
    rate_tables,
    results_table,
    round_tables,
)
from fedlora_cli.render.views.findings import findings
from fedlora_cli.reports.simulate import SimulateReport
from fedlora_cli.text import rank_range


def simulate_view(report: SimulateReport, *, details: bool, warnings: bool = False) -> View:
    """The comparison of the arms; with `details`, also every round and the whole setting; with
    `warnings`, also the warnings, which a terminal shows separately.
    """
    blocks: list[Block] = [Paragraph(wrapped(_trained(report))), results_table(report)]
    blocks += rate_tables(report)
    blocks += [table for grid in report.grids for table in grid_tables(report, grid)]
    blocks += round_tables(report)
    ended = [row for row in report.best if row.rounds]
    if ended:
        blocks.append(cost_table(ended))
    if details:
        blocks += [every_round_table(report, row) for row in ended]
        blocks.append(_setting(report.setting))
    blocks.append(Paragraph("\n".join(wrapped(line) for line in _meanings(report))))
    if warnings and report.warnings:
        blocks.append(Paragraph("\n".join(map(wrapped, report.warnings)), "warning"))
    blocks += findings(report)
    return View("simulate", _summary(report), tuple(blocks), report.output)


def _summary(report: SimulateReport) -> str:
    return (
        f"{report.task}, {count(len(report.ranks), 'client')} of {ranks_text(report.ranks)}, "
        f"{count(report.rounds, 'round')}, {count(len(report.seeds), 'seed')}"
    )


def _trained(report: SimulateReport) -> str:
    part = str(report.present) if report.present < len(report.ranks) else "all"
    known = report.start_accuracy.mean is not None
    start = f", accuracy {accuracy(report, report.start_accuracy)} before training" if known else ""
    return (
        f"{report.model}: {report.train_examples:,} training examples split over "
        f"{count(len(report.ranks), 'client')}, {part} of them in every round; "
        f"{report.test_examples:,} test examples{start}"
    )


def _meanings(report: SimulateReport) -> list[str]:
    """The meaning of the columns."""
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
    """The setting that all runs share."""
    return table(
        [pair for pair in _flat(setting) if pair[1]],
        [
            ("setting", "name", lambda pair: pair[0]),
            ("value", "name", lambda pair: pair[1]),
        ],
        shown=None,
    )


def _flat(setting: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in setting.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, (list, tuple)):
            # Many clients have the same rank.
            groups = [(len(list(same)), item) for item, same in groupby(value)]
            yield name, ", ".join(f"{n}x{item}" if n > 1 else f"{item}" for n, item in groups)
        else:
            yield name, "" if value is None else str(value)
