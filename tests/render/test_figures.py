"""The pictures: what is drawn is what the report says, and nothing in a report breaks them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlora_cli.render.figures.canvas import line_style, rendered
from fedlora_cli.render.figures.compare import compare_figure
from fedlora_cli.render.figures.diagnose import diagnose_figure
from fedlora_cli.render.page import page
from fedlora_cli.render.view import Bar, Column, Paragraph, Table, View
from fedlora_cli.reports.compare import CompareReport, MethodRow
from fedlora_cli.reports.diagnose import (
    AdapterRow,
    CohortFindings,
    DiagnoseReport,
    EnergyRow,
    HoldingRow,
    ModuleSpectrum,
    Similarity,
    Subject,
    Thresholds,
    Trend,
)

HOSTILE = "$x_{1}$ \\$ a_b \x1b[2J\u202e 诊所 <script>alert(1)</script> " + "n" * 200


def spectrum(name: str, s: Sequence[float]) -> ModuleSpectrum:
    return ModuleSpectrum(name, (64, 64), len(s), 0.5, 3.0, 2.0, 1, 2, 3, 0, 1.0, tuple(s))


def falling(rank: int) -> tuple[float, ...]:
    return tuple(2.0**-i for i in range(rank))


def adapter(
    name: str, energy: Sequence[float], modules: Sequence[ModuleSpectrum] = (), share: float = 0.5
) -> AdapterRow:
    halves = ((1, 2), (3, 4), (5, 8), (9, 16))
    total = sum(energy)
    parts = tuple(
        EnergyRow(a, b, sum(energy[a - 1 : b]) / total if total else None)
        for a, b in halves
        if b <= len(energy)
    )
    return AdapterRow(
        name, name, len(energy), 10.0, share, 0.75, 3.0, 2.0, 1, 2, 3, 0, 9, 1.0,
        tuple(energy), parts, tuple(modules),
    )  # fmt: skip


def trend(rho: Sequence[float | None], **others: Sequence[float | None]) -> Trend:
    unknown = (None,) * len(rho)
    return Trend(
        len(rho), tuple(f"round-{i}" for i in range(len(rho))), tuple(rho),
        tuple(others.get("clients", unknown)), 2, unknown, unknown,
        tuple(others.get("kept", unknown)),
        0.5, 0.9, 1, 0.3, tuple(others.get("predicted", unknown)),
    )  # fmt: skip


#: Other limits than those of a diagnosis: figures take theirs from the report.
LIMITS = Thresholds(at_risk=0.6, collapsed=0.2, rate_at_risk=0.8, outlier=3.0, dead=1e-6)


def diagnosis(
    subject: Subject,
    adapters: Sequence[AdapterRow],
    *,
    shared_rank: int | None = 2,
    cohort: CohortFindings | None = None,
    trend: Trend | None = None,
) -> DiagnoseReport:
    return DiagnoseReport(
        subject, "at risk", "because", shared_rank, 0.9, tuple(adapters), (), cohort, trend,
        LIMITS, (), "1",
    )  # fmt: skip


def cohort(count: int, *, similarity: bool = True) -> CohortFindings:
    cosine = tuple(tuple(1.0 - abs(i - j) / count for i in range(count)) for j in range(count))
    rows = (HoldingRow(1, 2, count, 1.0, 0.9, 0.25, "a"), HoldingRow(3, 4, 1, 0.1, 0.1, 0.8, "b"))
    alike = Similarity(cosine, cosine, cosine) if similarity else None
    return CohortFindings(0.9, (), rows, alike, ())


def method(
    name: str, energy: Sequence[float], ratio: float | None, refused: str | None = None
) -> MethodRow:
    rank = None if refused else len(energy)
    return MethodRow(name, rank, ratio, 1.0, 1.0, 1.0, 1.0, 0.1, tuple(energy), 0.1, refused)


def comparison(rows: Sequence[MethodRow], norm: float = 2.0) -> CompareReport:
    known = [row.refused is None for row in rows]
    distances = tuple(
        tuple(abs(i - j) / 10 if a and b else None for j, b in enumerate(known))
        for i, a in enumerate(known)
    )
    return CompareReport(2, (2, 4), (1.0, 2.0), 3, norm, tuple(rows), distances, 0.1, (), "1")


def panel(figure: Figure, title: str) -> Axes:
    found = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    assert len(found) == 1, [axes.get_title(loc="left") for axes in figure.axes]
    return found[0]


def line(axes: Axes, label: str) -> np.ndarray:
    return next(np.asarray(one.get_ydata()) for one in axes.lines if one.get_label() == label)


def picture(axes: Axes) -> np.ndarray:
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def texts(axes: Axes) -> str:
    return "\n".join(text.get_text() for text in axes.texts)


def labelled(axes: Axes) -> bool:
    return bool(axes.get_xlabel() and axes.get_ylabel())


def test_an_adapter_shows_its_energy_within_and_beyond_the_shared_rank() -> None:
    report = diagnosis("adapter", [adapter("a", (6, 3, 0.9, 0.1), [spectrum("m", falling(4))])])

    axes = panel(diagnose_figure(report), "Energy by rank index")

    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([0.6, 0.3, 0.09, 0.01])
    within, beyond = axes.containers
    assert (len(within), len(beyond)) == (2, 2)
    assert within[0].get_facecolor() != beyond[0].get_facecolor()
    assert axes.get_yscale() == "log"
    assert "ρ = 0.750, effective rank 3.0" in texts(axes)
    assert axes.get_legend() is not None
    assert labelled(axes)


def test_a_map_has_a_row_for_every_module_in_the_order_of_the_model() -> None:
    modules = [spectrum("m.10.q", (2.0, 1.0)), spectrum("m.9.q", (1.0,)), spectrum("m.9.z", (0.0,))]

    axes = panel(diagnose_figure(diagnosis("adapter", [adapter("a", (6, 3), modules)])), "Where")

    assert [label.get_text() for label in axes.get_yticklabels()] == ["m.9.q", "m.9.z", "m.10.q"]
    values = picture(axes)
    assert values[0, 0] == 1.0
    assert values[2] == pytest.approx([0.8, 0.2])
    assert np.isnan(values[0, 1])  # no such direction
    assert np.isnan(values[1]).all()  # no energy
    assert "hatched" in texts(axes)
    assert labelled(axes)


def test_hundreds_of_modules_are_labelled_by_layer() -> None:
    names = [f"model.layers.{i}.{part}_proj" for i in range(32) for part in "qkvogud"]
    modules = [spectrum(name, falling(4)) for name in names]

    axes = panel(diagnose_figure(diagnosis("adapter", [adapter("a", (2, 1), modules)])), "Where")

    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"layers.{i}" for i in range(32)]
    assert list(axes.get_yticks()[:2]) == [4.0, 11.0]
    assert picture(axes).shape == (224, 4)


def test_clients_are_bars_of_shares_by_partition() -> None:
    clients = [adapter("ann", (3, 1)), adapter("bob", (4, 2, 1, 1), share=0.25), adapter("nil", ())]

    figure = diagnose_figure(diagnosis("clients", clients, cohort=cohort(3)))

    axes = panel(figure, "Energy of each client")
    first, second = axes.containers
    assert [bar.get_width() for bar in first] == pytest.approx([1.0, 0.75, 0.0])
    assert [bar.get_x() + bar.get_width() for bar in second] == pytest.approx([1.0, 1.0, 0.0])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["ann, r 2, 50 %", "bob, r 4, 25 %", "nil, r 0, 50 %"]
    assert "no energy" in texts(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1-2", "3-4"]


def test_clients_show_who_resembles_whom_and_who_decides() -> None:
    clients = [adapter(name, (3, 1)) for name in "abc"]
    found = cohort(3)

    figure = diagnose_figure(diagnosis("clients", clients, cohort=found))

    alike = panel(figure, "Similarity of the updates")
    assert found.similarity is not None
    assert np.array_equal(picture(alike), np.array(found.similarity.cosine))
    assert alike.images[0].get_clim() == (-1.0, 1.0)
    assert texts(alike).split().count("0.67") == 4
    holders = panel(figure, "Holders by rank index")
    weights = [np.asarray(one.get_xdata()) for one in holders.lines]
    assert np.array_equal(weights, [[1.0, 0.1], [0.25, 0.8]])
    assert len(holders.get_legend().get_texts()) == 2


def test_many_clients_have_no_numbers_and_without_similarity_there_is_no_matrix() -> None:
    clients = [adapter(f"c{i}", (3, 1)) for i in range(13)]
    many = diagnose_figure(diagnosis("clients", clients, cohort=cohort(13)))
    unasked = diagnose_figure(diagnosis("clients", clients, cohort=cohort(13, similarity=False)))

    assert "1.00" not in texts(panel(many, "Similarity of the updates"))
    assert not any("alike" in axes.get_title(loc="left") for axes in unasked.axes)


def test_rounds_show_the_decay_on_a_log_axis_with_gaps_and_what_is_below_it() -> None:
    found = trend(
        (0.9, None, 0.99, 1.0), clients=(0.8, 0.9, 0.9, 0.9), predicted=(0.9, 0.99, 1.0, 1.0)
    )
    series = [adapter(f"r{i}", (3, 1)) for i in range(4)]

    axes = panel(diagnose_figure(diagnosis("rounds", series, trend=found)), "Energy beyond")

    assert line(axes, "global adapter") == pytest.approx([0.1, np.nan, 0.01, np.nan], nan_ok=True)
    assert line(axes, "clients above the shared rank") == pytest.approx([0.2, 0.1, 0.1, 0.1])
    styles = {one.get_label(): one.get_linestyle() for one in axes.lines}
    assert styles["global adapter"] == "-"
    assert styles["clients above the shared rank"] == "--"
    assert styles["predicted without training"] == ":"
    bottom = axes.get_ylim()[0]
    marked = [
        (list(one.get_xdata()), list(one.get_ydata()))
        for one in axes.lines
        if one.get_marker() == "v" and len(one.get_xdata())
    ]
    assert ([4], [bottom]) in marked
    assert axes.get_yscale() == "log"
    assert "γ = 0.5 per round from round 1 on (R² 0.90); predicted 0.3" in texts(axes)
    assert labelled(axes)


def test_rounds_show_what_is_kept_between_the_thresholds_of_the_verdict() -> None:
    found = trend((0.9, 0.95, 0.99), kept=(1.0, None, 0.3))
    series = [adapter(f"r{i}", (3, 1)) for i in range(3)]

    axes = panel(
        diagnose_figure(diagnosis("rounds", series, trend=found)), "Clients' energy that is left"
    )

    assert list(axes.lines[0].get_ydata()) == pytest.approx([1.0, np.nan, 0.3], nan_ok=True)
    assert [one.get_ydata()[0] for one in axes.lines[1:]] == [0.6, 0.2]
    assert "at risk below 60 %" in texts(axes)
    assert "collapsed below 20 %" in texts(axes)


def test_rounds_show_every_rank_index_of_every_round() -> None:
    series = [adapter("r1", (3, 1)), adapter("r2", (8, 1, 1)), adapter("r3", ())]
    found = trend((0.9, 0.95, None))

    axes = panel(diagnose_figure(diagnosis("rounds", series, trend=found)), "Where the global")

    expected = [[0.75, 0.8, np.nan], [0.25, 0.1, np.nan], [np.nan, 0.1, np.nan]]
    assert picture(axes) == pytest.approx(np.array(expected), nan_ok=True)


def test_a_share_of_nothing_is_dead_and_not_absent() -> None:
    modules = [spectrum("m", (1.0, 0.0))]

    axes = panel(diagnose_figure(diagnosis("adapter", [adapter("a", (1, 0), modules)])), "Where")

    assert 0 < picture(axes)[0, 1] < axes.images[0].get_clim()[0]


def test_methods_are_compared_by_ratio_distance_and_energy() -> None:
    rows = [
        method("raflora", (2, 1, 0.5, 0.5), 0.75),
        method("ffa", (), None, "clients/b: its A differs; choose raflora"),
        method("flora", (2, 1, 0.5, 0.1, 0.1), 0.8),
    ]

    figure = compare_figure(comparison(rows))

    ratios = panel(figure, "ρ")
    within, beyond = ratios.containers
    assert [bar.get_width() for bar in within] == pytest.approx([0.75, 0, 0.8])
    assert [bar.get_width() for bar in beyond] == pytest.approx([0.25, 0, 0.2])
    assert texts(ratios).split("\n")[:3] == ["0.750", "cannot run: its A differs", "0.800"]
    apart = panel(figure, "Distances between")
    assert np.array_equal(picture(apart), [[0.0, 0.2], [0.2, 0.0]])
    assert [label.get_text() for label in apart.get_yticklabels()] == ["raflora", "flora"]
    energy = panel(figure, "Energy")
    assert line(energy, "raflora") == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert energy.get_xlim() == (0.5, 4.5)
    assert "cut at 4: flora" in texts(energy)
    assert labelled(energy)


def test_lines_of_methods_differ_without_colour() -> None:
    rows = [method(f"m{i}", falling(4), 0.5) for i in range(8)]

    axes = panel(compare_figure(comparison(rows)), "Energy")

    lines = [one for one in axes.lines if one.get_label().startswith("m")]
    assert len({one.get_marker() for one in lines}) == 8
    assert len({str(one._unscaled_dash_pattern) for one in lines}) == 8


def test_lines_differ_also_where_their_colours_repeat() -> None:
    looks = [line_style(number) for number in range(64)]

    assert looks[8]["color"] == looks[0]["color"]
    assert len({tuple(map(str, look.values())) for look in looks}) == 64


def many(count: int, rank: int) -> list[ModuleSpectrum]:
    return [spectrum(f"{HOSTILE}.{i}", falling(rank)) for i in range(count)]


CASES: dict[str, Callable[[], Figure]] = {
    "nothing at all": lambda: diagnose_figure(
        diagnosis("adapter", [adapter("a", ())], shared_rank=None)
    ),
    "zeros": lambda: diagnose_figure(
        diagnosis("adapter", [adapter("a", (0, 0), [spectrum("m", (0.0, 0.0))])])
    ),
    "rank 1": lambda: diagnose_figure(
        diagnosis("adapter", [adapter("a", (1,), [spectrum("m", (1e-200,))])], shared_rank=1)
    ),
    "300 modules of rank 256": lambda: diagnose_figure(
        diagnosis("adapter", [adapter(HOSTILE, falling(256), many(300, 256))], shared_rank=300)
    ),
    "100 clients": lambda: diagnose_figure(
        diagnosis("clients", [adapter(HOSTILE, (2, 1))] * 100, cohort=cohort(100))
    ),
    "one client": lambda: diagnose_figure(
        diagnosis("clients", [adapter("a", (2, 1))], shared_rank=None)
    ),
    "one round": lambda: diagnose_figure(
        diagnosis("rounds", [adapter(HOSTILE, (1,), many(1, 1))], trend=trend((0.9,)))
    ),
    "rounds without energy": lambda: diagnose_figure(
        diagnosis("rounds", [adapter("a", ())] * 3, shared_rank=None, trend=trend((None,) * 3))
    ),
    "rounds without a trend": lambda: diagnose_figure(
        diagnosis("rounds", [adapter("a", (2, 1))] * 2)
    ),
    "collapsed from the start": lambda: diagnose_figure(
        diagnosis("rounds", [adapter("a", (1, 0))] * 2, trend=trend((1.0, 1.0), kept=(0.0, 0.0)))
    ),
    "every method refused": lambda: compare_figure(
        comparison([method("a", (), None, HOSTILE), method("b", (), None, "no")], norm=0.0)
    ),
    "methods without energy": lambda: compare_figure(
        comparison([method(HOSTILE, (0.0,), None), method("b", (), None)], norm=0.0)
    ),
    "more methods than colours": lambda: compare_figure(
        comparison([method(f"m{i}", falling(300), 0.5) for i in range(20)])
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_odd_is_drawn_all_the_same(case: str) -> None:
    figure = CASES[case]()

    drawing = rendered(figure, "svg")

    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert not re.search(rb' (?:d|x|y|transform)="[^"]*(?:nan|inf)', drawing)
    for axes in figure.axes:
        box = axes.get_position()
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1
        assert box.height > 0.1


@pytest.mark.parametrize(
    ("kind", "magic"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-")]
)
def test_the_same_report_gives_the_same_bytes(kind: str, magic: bytes) -> None:
    report = diagnosis("clients", [adapter(name, (3, 1)) for name in "abc"], cohort=cohort(3))
    once, again = diagnose_figure(report), diagnose_figure(report)
    for other in ("pdf", "png", "svg"):
        rendered(again, other)  # what was drawn before does not matter

    assert rendered(once, kind).startswith(magic)
    assert rendered(once, kind) == rendered(again, kind)


def test_the_look_does_not_depend_on_the_settings_of_the_user() -> None:
    import matplotlib as mpl

    report = diagnosis("adapter", [adapter("a", (3, 1), [spectrum("m", (1.0,))])])
    expected = rendered(diagnose_figure(report), "png")

    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert rendered(diagnose_figure(report), "png") == expected


class Reader(HTMLParser):
    """Tags, their attributes, and the text of the cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def svg() -> bytes:
    report = diagnosis("adapter", [adapter("a", (3, 1), [spectrum("m", (1.0, 0.1))])])
    return rendered(diagnose_figure(report), "svg")


def view(name: str = "ann", rows: int = 1) -> View:
    heads = (Column("client", "name"), Column("ρ"), Column("energy", "bar"))
    cells = tuple((f"{name}-{i}", "0.5", Bar(0.25)) for i in range(rows))
    return View(name, "8 clients", (
        Table(heads, cells, title="all clients", shown=20),
        Paragraph("fine\nso far"), Paragraph("look out", "warning"), Paragraph("lost", "bad"),
    ))  # fmt: skip


def test_a_page_needs_nothing_but_itself() -> None:
    html = page(view(), svg())
    read = Reader(html)

    assert not {"script", "link", "iframe", "object", "embed", "base"} & {t for t, _ in read.tags}
    addresses = [
        value or ""
        for _, attributes in read.tags
        for key, value in attributes.items()
        if key.split(":")[-1] in ("href", "src", "srcset", "action", "data")
    ]
    assert addresses, "the figure uses its own definitions"
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in addresses)
    assert "@import" not in html
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    assert html.count("<!DOCTYPE") == 1
    assert "<?xml" not in html


def test_a_page_speaks_to_those_who_cannot_see_it() -> None:
    read = Reader(page(view(rows=3), svg()))

    assert read.all("html") == [{"lang": "en"}]
    assert [one["role"] for one in read.all("div") if "figure" in (one["class"] or "")] == ["img"]
    assert all(one["aria-label"] for one in read.all("div"))
    assert len(read.all("caption")) == 1
    assert [one["scope"] for one in read.all("th")] == ["col"] * 3 + ["row"] * 3
    assert "Warning: " in read.text
    assert "Bad: " in read.text


def test_a_page_holds_every_row_with_its_bar_and_its_number() -> None:
    read = Reader(page(view(rows=100), svg()))

    assert [f"ann-{i}" for i in range(100)] == [text for text in read.text if "ann-" in text]
    assert read.text.count("25 %") == 100
    assert [one["style"] for one in read.all("span") if "style" in one] == ["width: 25.00%"] * 100


def test_a_bar_whose_neighbour_has_the_number_does_not_repeat_it() -> None:
    heads = (Column("rank index", "text"), Column("energy", "bar"), Column(""))
    table = Table(heads, (("1-2", Bar(0.25), "25.0 %"), ("3-4", Bar(None), "-")))

    read = Reader(page(View("a", "b", (table,)), svg()))

    assert "25 %" not in read.text
    assert "25.0 %" in read.text
    widths = [one["style"] for one in read.all("span") if "style" in one]
    assert widths == ["width: 25.00%", "width: 0.00%"]


def test_names_are_text_on_a_page() -> None:
    html = page(view(HOSTILE), svg())

    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "\\x1b[2J\\u202e 诊所" in html


def test_lines_of_a_paragraph_are_broken_where_they_should_be() -> None:
    assert ">fine<br>so far</p>" in page(view(), svg()).replace("\n", "")


def test_the_same_view_gives_the_same_page() -> None:
    assert page(view(), svg()) == page(view(), svg())


def test_a_change_of_a_number_changes_the_picture() -> None:
    report = diagnosis("adapter", [adapter("a", (3, 1), [spectrum("m", (1.0,))])])
    other = replace(report, adapters=(adapter("a", (3, math.pi), [spectrum("m", (1.0,))]),))

    assert rendered(diagnose_figure(report), "svg") != rendered(diagnose_figure(other), "svg")
