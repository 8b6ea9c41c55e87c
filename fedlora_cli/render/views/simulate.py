"""The view of a simulation: the training, every arm at its best rate, and the findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from fedlora_cli.render.view import Block, Column, Fields, Table, View, paragraphs, table
from fedlora_cli.render.views import arms
from fedlora_cli.render.views.findings import findings
from fedlora_cli.render.wording import count, duration, ranks_text
from fedlora_cli.reports.simulate import SimulatedClient, SimulateReport
from fedlora_cli.text import rank_range


def simulate_view(report: SimulateReport, *, details: bool, warnings: bool = False) -> View:
    """The comparison of the arms; with `details`, also every round and the whole setting; with
    `warnings`, also the warnings, which a terminal shows separately.
    """
    blocks: list[Block] = [*paragraphs([_trained(report)])]
    if report.clients is not None:
        shown = None if details else 20
        blocks.append(table(report.clients, _CLIENT_FIELDS, shown=shown))
    blocks += [
        arms.results_table(report),
        *arms.rate_tables(report),
        *(part for grid in report.grids for part in arms.grid_tables(report, grid)),
        *arms.round_tables(report),
    ]
    ended = [row for row in report.best if row.rounds]
    if ended:
        blocks.append(table(ended, arms.COST_FIELDS, "cost of a round", shown=None))
    if details:
        blocks += [arms.every_round_table(report, row) for row in ended]
        rows = tuple(pair for pair in _flat(report.setting) if pair[1])
        columns = (Column("setting", "name"), Column("value", "name"))
        blocks.append(Table(columns, rows, shown=None))
    blocks += paragraphs(_meanings(report))
    blocks += paragraphs(report.warnings if warnings else (), "warning")
    blocks += findings(report)
    summary = (
        f"{report.task}, {count(len(report.ranks), 'client')} of {ranks_text(report.ranks)}, "
        f"{count(report.rounds, 'round')}, {count(len(report.seeds), 'seed')}"
    )
    return View("simulate", summary, tuple(blocks), report.output)


def _trained(report: SimulateReport) -> str:
    part = str(report.present) if report.present < len(report.ranks) else "all"
    known = report.start_accuracy.mean is not None
    start = (
        f", accuracy {arms.accuracy(report, report.start_accuracy)} before training"
        if known
        else ""
    )
    return (
        f"{report.model}: {report.train_examples:,} training examples split over "
        f"{count(len(report.ranks), 'client')}, {part} of them in every round; "
        f"{report.test_examples:,} test examples{start}"
    )


_CLIENT_FIELDS: Fields[SimulatedClient] = (
    ("client", "name", lambda client: client.name),
    ("rank", "number", lambda client: client.rank),
    ("examples", "number", lambda client: client.samples),
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


def _flat(setting: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in setting.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, (list, tuple)):  # many clients have the same rank
            groups = [(len(list(same)), item) for item, same in groupby(value)]
            yield name, ", ".join(f"{n}x{item}" if n > 1 else f"{item}" for n, item in groups)
        elif value is not None:
            yield name, str(value)
