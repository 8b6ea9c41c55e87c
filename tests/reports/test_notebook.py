"""Reports in Python: as plain values, as a line, and as HTML in a notebook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.adapters import Spec, make
from support.cli import run
from support.rounds import make_round
from support.simulate_reports import arm, simulation

from fedlora_cli import (
    AggregateReport,
    DistributeReport,
    InitReport,
    InspectReport,
    PredictReport,
    aggregate,
    compare,
    diagnose,
    distribute,
    inspect,
    predict,
)
from fedlora_cli.reports.distribution import DistributedRow, TargetRow
from fedlora_cli.reports.inspect import Fault, InspectedAdapter
from fedlora_cli.reports.simulate import Lead

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>$\\href{a}{b}$\x1b[2J\u202e'


class Page(HTMLParser):
    """The tags of a fragment, all closed in their order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: dict[str, set[str | None]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def cells(self) -> list[str]:
        return [text for text in self.text if text.strip()]


def html_of(report: Any) -> str:
    """What Jupyter would show."""
    html: str = report._repr_html_()
    return html


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of ann, bob and cid with ranks 2, 3 and 6, its global adapter, and two rounds."""
    home = tmp_path_factory.mktemp("home")
    make_round(home, [Spec("ann", 2, 60), Spec("bob", 3, 30), Spec("cid", 6, 10)])
    aggregate([home / "round"], home / "out")
    (home / "rounds").mkdir()
    for number in (1, 2):
        aggregate([home / "round"], home / f"rounds/round-{number}")
    return home


@pytest.fixture(scope="module")
def reports(home: Path) -> dict[str, Any]:
    """A report of every command, run in the home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return made_here()


def made_here() -> dict[str, Any]:
    row = DistributedRow("rank-2", "start/rank-2", 2, 4.0, 2.0, "float32", 2, 4, 4, 142, 700, None)
    return {
        "aggregate": aggregate([Path("round")], Path("again")),
        "compare": compare([Path("round")]),
        "diagnose": diagnose([Path("round")]),
        "diagnose adapter": diagnose([Path("out")]),
        "diagnose rounds": diagnose([Path("rounds")]),
        "distribute": distribute(Path("out"), Path("next"), Path("round")),
        "init": InitReport(
            "base", "transformers.LlamaForCausalLM", None, 0, "start",
            (TargetRow("q_proj", (12, 20), ("layers.0.q_proj", "layers.1.q_proj")),), (), (row,),
            ("a warning",), "0.1.0",
        ),
        "inspect": inspect([Path("round")]),
        "predict": predict((2, 3, 6), (60, 30, 10)),
        "simulate": simulation([arm("flexlora", accuracy=0.5), arm("raflora", accuracy=0.625)]),
    }  # fmt: skip


def leaves(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if type(value) is list:
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("diagnose", ["diagnose", "round"]),
        ("diagnose rounds", ["diagnose", "rounds"]),
        ("inspect", ["inspect", "round"]),
        ("predict", ["predict", "--ranks", "2,3,6", "--samples", "60,30,10"]),
        ("distribute", ["distribute", "out", "-o", "next", "--like", "round", "--force"]),
        ("aggregate", ["aggregate", "round", "-o", "again", "--force"]),
    ],
)
def test_a_report_as_values_is_what_the_command_prints(
    home: Path, reports: dict[str, Any], monkeypatch, name: str, command: list[str]
) -> None:
    monkeypatch.chdir(home)
    assert reports[name].to_dict() == json.loads(run(*command, "--json").stdout)


def test_values_are_plain(reports: dict[str, Any]) -> None:
    for name, report in reports.items():
        document = report.to_dict()
        assert document["schema"] == f"fedlora.{name.split()[0]}/1"
        kinds = {type(leaf) for leaf in leaves(document)}
        assert kinds <= {str, int, float, bool, type(None)}, name
        json.dumps(document, allow_nan=False)


def test_a_report_is_a_line_with_the_first_facts(reports: dict[str, Any]) -> None:
    made: AggregateReport = reports["aggregate"]
    assert repr(made) == (
        "<AggregateReport: method raflora, clients 3, ranks 2-6, shared rank 2, output rank 6, "
        f"rank at risk 4-6, ρ {made.energy_ratio:.4g}, kept energy {made.kept_energy:.4g}, "
        f"output again, warnings {len(made.warnings)}>"
    )
    assert repr(reports["predict"]).startswith(
        "<PredictReport: clients 3, ranks 2-6, shared rank 2, rank at risk 4-6, clients per round 3"
    )
    assert repr(reports["compare"]).startswith(
        f"<CompareReport: methods {len(reports['compare'].methods)}, clients 3, ranks 2-6, "
    )
    assert repr(reports["inspect"]) == (
        "<InspectReport: adapters 3, ranks 2-6, differences 2, faults 0>"
    )
    assert repr(reports["diagnose"]).startswith(
        "<DiagnoseReport: verdict none, clients 3, ranks 2-6, shared rank 2, rank at risk 4-6, ρ 0."
    )
    rounds = reports["diagnose rounds"]
    assert repr(rounds).startswith(
        f"<DiagnoseReport: verdict {rounds.verdict}, method raflora, rounds 2, ranks 6, "
    )
    assert "adapters 1," in repr(reports["diagnose adapter"])
    assert repr(reports["distribute"]).startswith(
        "<DistributeReport: clients 3, ranks 2-6, global rank 6, modules 2, output "
    )
    assert repr(reports["init"]) == (
        "<InitReport: adapters 1, ranks 2, modules 2, base model base, "
        "model class transformers.LlamaForCausalLM, seed 0, output start, warnings 1>"
    )
    lead = Lead("raflora", "flexlora", 0.125, 0.05, 3, significant=True)
    assert repr(replace(reports["simulate"], lead=lead)) == (
        "<SimulateReport: task digits, clients 10, ranks 4-32, rounds 20, seeds 3, arms 2, "
        "best arm raflora, lead significant, output run, warnings 1>"
    )


def test_a_page_has_warnings_before_facts_and_rows(reports: dict[str, Any]) -> None:
    for name, report in reports.items():
        page = Page(html_of(report))
        assert page.cells[0] == type(report).__name__
        assert not {"script", "style"} & set(page.tags)
        assert "table" in page.tags, name
    made: AggregateReport = reports["aggregate"]
    page = Page(html_of(made))
    assert page.cells[1 : 1 + len(made.warnings)] == list(made.warnings)
    start = page.cells.index("‖ΔW‖") + 1
    assert page.cells[start : start + 6] == [
        "ann", "2", "60", f"{made.clients[0].weight:.4g}", f"{made.clients[0].max_weight:.4g}",
        f"{made.clients[0].norm:.4g}",
    ]  # fmt: skip


def test_faults_come_first(reports: dict[str, Any]) -> None:
    faulty = replace(reports["inspect"], faults=(Fault("a/file", "it is empty", "send it again"),))
    assert Page(html_of(faulty)).cells[1] == "a/file: it is empty; send it again"
    assert repr(faulty).endswith("faults 1>")


def hostile(reports: dict[str, Any]) -> dict[str, Any]:
    """The reports with a hostile name, warning, and note."""
    made, inspected = reports["aggregate"], reports["inspect"]
    rows = tuple(replace(one, name=HOSTILE) for one in made.clients)
    adapters = tuple(replace(one, name=HOSTILE, base_model=HOSTILE) for one in inspected.adapters)
    return {
        "aggregate": replace(made, clients=rows, warnings=(HOSTILE,), output=HOSTILE),
        "init": replace(reports["init"], base_model=HOSTILE, warnings=(HOSTILE,)),
        "inspect": replace(
            inspected, adapters=adapters, faults=(Fault(HOSTILE, HOSTILE, "leave"),),
            notes=(HOSTILE,),
        ),
        "diagnose": replace(
            reports["diagnose"], reason=HOSTILE, methods=(HOSTILE,), warnings=(HOSTILE,)
        ),
    }  # fmt: skip


def test_hostile_names_stay_text(reports: dict[str, Any]) -> None:
    clean = {name: set(Page(html_of(report)).tags) for name, report in reports.items()}
    for name, report in hostile(reports).items():
        html, line = html_of(report), repr(report)
        page = Page(html)
        assert set(page.tags) <= clean[name] | {"ul", "li"}
        assert set(page.attributes) == {"class", "style"}
        assert any(text.startswith('<script>alert("x")') for text in page.text)
        for text in (html.replace("\n", ""), line):
            assert text.isprintable()
        # Jupyter typesets formulas anywhere but here.
        assert html.startswith('<div class="tex2jax_ignore mathjax_ignore">')


def huge(reports: dict[str, Any]) -> dict[str, Any]:
    """5000 clients, warnings as many, and names of 10 000 letters."""
    made, inspected, handed = reports["aggregate"], reports["inspect"], reports["distribute"]
    forecast: PredictReport = reports["predict"]
    [name] = {"n" * 10_000}
    adapter: InspectedAdapter = inspected.adapters[0]
    return {
        "aggregate": replace(
            made, clients=(replace(made.clients[0], name=name),) * 5000, warnings=(name,) * 5000
        ),
        "inspect": replace(inspected, adapters=(replace(adapter, name=name),) * 5000),
        "distribute": replace(handed, clients=handed.clients[:1] * 5000),
        "predict": replace(forecast, ranks=(2, 6) * 2500, methods=forecast.methods[:1] * 5000),
    }


def test_huge_reports_are_cut_and_the_rest_is_counted(reports: dict[str, Any]) -> None:
    for name, report in huge(reports).items():
        line, html = repr(report), html_of(report)
        assert "\n" not in line
        assert len(line) < 600, name
        assert len(html) < 25_000
        assert "and 4980 more of 5000 rows; to_dict() has all of them" in html
        assert Page(html).tags.count("tr") == 21
    page = Page(html_of(huge(reports)["aggregate"]))
    assert "and 4980 more; to_dict() has all of them" in page.text
    assert "n" * 59 + "…" in page.text


def test_a_report_without_rows_or_values_is_shown(reports: dict[str, Any]) -> None:
    made = replace(reports["aggregate"], clients=(), energy_ratio=None, kept_energy=None, rank=None)
    assert repr(made).startswith("<AggregateReport: method raflora, clients 0, shared rank 2, rank")
    assert "table" not in Page(html_of(made)).tags
    empty = InspectReport((), (), (), (), False, "0.1.0")
    assert repr(empty) == "<InspectReport: adapters 0, differences 0, faults 0>"
    nowhere = DistributeReport("global", "next", None, 4, (), (), (), "0.1.0")
    assert repr(nowhere) == (
        "<DistributeReport: clients 0, global rank 4, modules 0, output next, warnings 0>"
    )


def test_a_name_that_only_looks_like_markup_is_kept(tmp_path: Path) -> None:
    """A folder can have such a name, and a client's folder is its name."""
    for name in ("<b>x", "a&lt;b", "$x$"):
        make(tmp_path / "round", Spec(name, 2))
    made = aggregate([tmp_path / "round"], tmp_path / "out")
    assert {"<b>x", "a&lt;b", "$x$"} <= set(Page(html_of(made)).text)
