"""What people are shown: tables that fit, bars that measure, progress when it is worth it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.adapters import Spec, make

from fedlora_cli import AggregateOptions, AggregateReport, aggregate
from fedlora_cli.render import progress
from fedlora_cli.render.terminal import on_terminal
from fedlora_cli.render.view import Bar, Column, Table, View
from fedlora_cli.render.views.aggregate import aggregate_view
from fedlora_cli.reports.document import to_json
from fedlora_cli.reports.model_card import model_card


@pytest.fixture
def report(tmp_path: Path) -> AggregateReport:
    for name, rank in (("ann", 2), ("bob", 4)):
        make(tmp_path / "round", Spec(name, rank=rank, samples=10))
    return aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))


def shown(report: AggregateReport, *, modules: bool = False, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(on_terminal(aggregate_view(report, modules=modules)))
    return console.file.getvalue()


def test_bars_are_as_long_as_the_energy_they_stand_for(report: AggregateReport) -> None:
    low, high = report.partitions
    even = replace(report, partitions=(replace(low, energy=0.75), replace(high, energy=0.25)))

    bars = [line.count("█") for line in shown(even).splitlines() if " %  █" in line]

    assert bars == [21, 7]
    assert "▏" in shown(replace(report, partitions=(replace(low, energy=1e-9),)))


def test_a_cohort_of_many_clients_with_long_names_still_fits(report: AggregateReport) -> None:
    rows = tuple(replace(report.clients[0], name=f"{i:03}-" + "x" * 90) for i in range(100))
    modules = tuple(replace(report.modules[0], name="base." * 30) for _ in range(3))

    many = replace(report, clients=rows, modules=modules)
    text, whole = shown(many), shown(many, modules=True)

    assert all(len(line) <= 80 for line in (text + whole).splitlines())
    assert "and 80 more; -v shows all" in text
    assert "more" not in whole


def test_json_has_null_where_there_is_no_number(report: AggregateReport) -> None:
    document = replace(report, energy_ratio=float("nan")).to_dict()

    assert json.loads(to_json(document), parse_constant=pytest.fail)["energy_ratio"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("inf")})


def test_the_card_escapes_names(report: AggregateReport) -> None:
    """As code: backslashes would not keep GitHub from finding @names in the rendered page."""
    rows = (replace(report.clients[0], name="a|b\x1b[2J"),)

    assert r"| `a\|b\x1b[2J` | 2 |" in model_card(replace(report, clients=rows, base_model=None))


@pytest.mark.parametrize(
    ("patience", "terminal", "wanted", "visible"),
    [(0.0, True, True, True), (60.0, True, True, False), (0.0, False, True, False),
     (0.0, True, False, False)],
)  # fmt: skip
def test_progress_is_shown_on_a_terminal_for_long_work(
    monkeypatch, patience: float, terminal: bool, wanted: bool, visible: bool
) -> None:
    class Waiting:
        """A timer under a clock of the test: it is up at once, or not before the end."""

        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            self.start = function if seconds == 0 else lambda: None
            self.cancel = self.join = lambda: None

    monkeypatch.setattr(progress, "Timer", Waiting)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)

    with progress.progress_on(console, shown=wanted) as stage:
        advance = stage("aggregating modules")
        for done in range(1, 4):
            advance(done, 3)

    output = console.file.getvalue()
    assert ("aggregating modules" in output) == visible
    assert ("3/3" in output) == visible


def test_wide_letters_and_ascii_terminals_keep_their_numbers() -> None:
    rows = (("病院" * 20, "12345.6", Bar(0.5), "99.9 %"), ("x" * 60, "1", Bar(None), "-"))
    heads = (Column("client", "name"), Column("samples"), Column("a bar with a long head", "bar"))
    view = View("wide", "names", (Table((*heads, Column("")), rows),))

    for plain in (False, True):
        console = Console(file=io.StringIO(), width=80)
        console.print(on_terminal(view, plain=plain))
        text = console.file.getvalue()
        assert all(cell_len(line) <= 80 for line in text.splitlines())
        assert "12345.6" in text
        assert "99.9 %" in text
        assert "a bar with a long head" in text
        assert ("…" in text) != plain
