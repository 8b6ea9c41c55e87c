"""What a simulation is told as: hand-made reports to tables, words and pictures; the command."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from support.simulate_reports import NONE, PLAIN, arm, diverged, simulation

from fedlora_cli.analysis.lead import difference
from fedlora_cli.render.figures.canvas import rendered
from fedlora_cli.render.figures.simulate import simulate_figure
from fedlora_cli.render.terminal import on_terminal
from fedlora_cli.render.view import Paragraph, Table
from fedlora_cli.render.views.simulate import simulate_view
from fedlora_cli.reports.simulate import ArmRow, SimulateReport, Spread
from fedlora_cli.simulation.arm import Arm

HOSTILE = "$x_{1}$ \\$ \x1b[2J\u202e 诊所 <script>" + "n" * 90
RATES = (5e-4, 1e-3, 2e-3)


def tried(method: str, accuracies: tuple[float, ...], **choices: float) -> list[ArmRow]:
    """An arm at all of the rates, marked where it is best."""
    best = max(range(len(RATES)), key=lambda i: accuracies[i])
    return [
        arm(method, rate=rate, accuracy=accuracy, best=i == best, **choices)
        for i, (rate, accuracy) in enumerate(zip(RATES, accuracies, strict=True))
    ]


def several_rates() -> SimulateReport:
    flexlora = tried("flexlora", (0.4, 0.5, 0.65))
    raflora = tried("raflora", (0.5, 0.6, 0.3))
    raflora[2] = diverged(raflora[2], 4, 6, 5)
    momentum = tried("raflora", (0.6, 0.7, 0.5), momentum=0.8)
    momentum[2] = diverged(momentum[2], 6)
    return simulation([*flexlora, *raflora, *momentum])


def grid() -> SimulateReport:
    return simulation(
        [
            arm("flexlora", accuracy=0.5),
            *(
                arm("raflora", q, b, accuracy=0.5 + (q or 0) / 10 + b / 5, ratio=0.9 - b / 10)
                for q in (None, 0.25, 1.0)
                for b in (0.0, 0.8)
            ),
            arm("raflora", 0.5, accuracy=0.55),  # with one momentum alone
        ]
    )


def tables(report: SimulateReport, *, details: bool = False) -> list[Table]:
    return [b for b in simulate_view(report, details=details).blocks if isinstance(b, Table)]


def table(report: SimulateReport, title: str, *, details: bool = False) -> Table:
    """The one table with that in its title, or the first of all."""
    found = [one for one in tables(report, details=details) if title in one.title]
    assert len(found) == 1 or not title
    return found[0]


def heads(found: Table) -> list[str]:
    return [column.name for column in found.columns]


def paragraphs(report: SimulateReport, **shown: bool) -> list[Paragraph]:
    view = simulate_view(report, **({"details": False} | shown))
    return [block for block in view.blocks if isinstance(block, Paragraph)]


def prose(report: SimulateReport) -> str:
    """All paragraphs, each on one line."""
    return "\n".join(" ".join(one.text.split()) for one in paragraphs(report))


def test_the_first_table_has_every_number_in_its_place() -> None:
    first = table(simulation(PLAIN), "")

    assert heads(first) == ["arm", "accuracy", "ρ at 4", "effective", "γ", "‖ΔW‖"]
    assert first.rows[0] == ("flexlora", "0.52 ± 0.02", "0.9979", "7.2", "0.876", "4.57")
    assert [row[0] for row in first.rows] == ["flexlora", "raflora", "raflora-b0.8"]
    costs = table(simulation(PLAIN), "cost of a round")
    assert heads(costs)[1:] == ["up", "down", "server", "training"]
    assert costs.rows[1] == ("raflora", "1.2 MB", "988 kB", "0.12 s", "3.2 s")


def test_an_accuracy_has_no_more_digits_than_examples_and_no_deviation_of_one_seed() -> None:
    one = simulation([arm("raflora", accuracy=0.5912, seeds=1)])
    fine = simulation([arm("raflora", accuracy=0.5912, sd=0.0123)], test_examples=10_000)

    assert table(one, "").rows[0][1] == "0.59"
    assert table(fine, "").rows[0][1] == "0.591 ± 0.012"
    assert "±" not in prose(one)
    assert "mean ± standard deviation over 3 seeds" in prose(fine)


def test_the_headline_says_what_was_trained() -> None:
    view = simulate_view(simulation(PLAIN), details=False)

    assert view.summary == "digits, 10 clients of ranks 4 to 32, 20 rounds, 3 seeds"
    assert (
        "run/base: 1,077 training examples split over 10 clients, 5 of them in every round; "
        "360 test examples, accuracy 0.10 ± 0.01 before training"
    ) in prose(simulation(PLAIN))
    whole = simulation(PLAIN, present=10, ranks=(8,) * 10, start_accuracy=NONE)
    assert "all of them in every round; 360 test examples\n" in prose(whole)
    assert "10 clients of rank 8," in simulate_view(whole, details=False).summary


def test_every_arm_is_shown_at_its_best_rate() -> None:
    report = several_rates()

    assert [row.rate for row in report.best] == [2e-3, 1e-3, 1e-3]
    first = table(report, "")
    assert heads(first)[1] == "best lr"
    assert [row[1:3] for row in first.rows] == [
        ("0.002", "0.65 ± 0.02"), ("0.001", "0.60 ± 0.02"), ("0.001", "0.70 ± 0.02"),
    ]  # fmt: skip
    unmarked = replace(report, arms=tuple(replace(row, best=False) for row in report.arms))
    assert [row.rate for row in unmarked.best] == [5e-4] * 3


def test_accuracy_by_rate_marks_the_best_and_says_what_diverged() -> None:
    report = several_rates()

    rates = table(report, "by learning rate")

    assert heads(rates) == ["arm", "0.0005", "0.001", "0.002"]
    assert rates.rows[0] == ("flexlora", "0.40 ± 0.02", "0.50 ± 0.02", "0.65 ± 0.02*")
    assert rates.rows[1][1:] == ("0.50 ± 0.02", "0.60 ± 0.02*", "diverged")
    warning = next(one for one in paragraphs(report) if one.tone == "warning")
    assert warning.text.splitlines()[:2] == [
        "raflora at lr 0.002: every run diverged in rounds 4 to 6",
        "raflora-b0.8 at lr 0.002: 1 of 3 runs diverged in round 6; its numbers leave",
    ]
    assert not any("by learning rate" in one.title for one in tables(simulation(PLAIN)))
    assert "raflora: every run diverged in round 2\n" in prose(
        simulation([diverged(arm("raflora"), 2, 2, 2), arm("flexlora")])
    )


def test_more_rates_than_fit_are_further_tables() -> None:
    rates = [10.0**-i for i in range(1, 9)]
    many = simulation([arm("raflora", rate=rate, best=rate == 0.1) for rate in rates])

    found = [one for one in tables(many) if "by learning rate" in one.title]

    assert len(found) == 2
    shown = [head for one in found for head in heads(one)[1:]]
    assert shown == [f"{rate:g}" for rate in sorted(rates)]


def test_a_grid_is_quorums_and_momenta_that_are_crossed() -> None:
    (found,) = grid().grids

    assert (found.method, found.quorums, found.momenta) == ("raflora", (0, 0.25, 1), (0, 0.8))
    assert found.rows[0][1] is not None
    assert found.rows[0][1].arm == "raflora-b0.8"
    for arms in (
        [arm("raflora", 0.5), arm("raflora", 1.0)],
        [arm("raflora", momentum=0.5), arm("raflora", momentum=0.8)],
        [arm("raflora"), arm("raflora", 0.5), arm("raflora", momentum=0.8)],
        [arm("raflora"), arm("flexlora", momentum=0.8), arm("raflora", 0.5, 0.8)],
    ):
        assert simulation(arms).grids == ()


def test_a_grid_is_two_tables() -> None:
    accuracy = table(grid(), "accuracy of raflora by quorum q and momentum β")
    ratio = table(grid(), "ρ at 4 of raflora by quorum q")

    assert heads(accuracy) == ["", "β = 0", "β = 0.8"]
    assert accuracy.rows == (
        ("q = 0", "0.50 ± 0.02", "0.66 ± 0.02"),
        ("q = 0.25", "0.53 ± 0.02", "0.69 ± 0.02"),
        ("q = 1", "0.60 ± 0.02", "0.76 ± 0.02"),
    )
    assert ratio.rows[1] == ("q = 0.25", "0.900", "0.820")


def test_rounds_are_the_first_the_last_and_some_between_that_were_scored() -> None:
    report = simulation(PLAIN)
    points = tuple(
        replace(point, accuracy=NONE) if point.round % 5 else point for point in PLAIN[0].rounds
    )
    seldom = simulation([replace(PLAIN[0], rounds=points)], start_accuracy=NONE)

    assert heads(table(report, "by round"))[1:] == ["start", "1", "4", "7", "11", "14", "17", "20"]
    assert table(report, "by round").rows[2][1:3] == ("0.10", "0.13")
    assert heads(table(seldom, "by round"))[1:] == ["5", "10", "15", "20"]
    unscored = replace(PLAIN[0], rounds=tuple(replace(p, accuracy=NONE) for p in points))
    assert not any("by round" in one.title for one in tables(simulation([unscored])))


def test_details_are_every_round_and_the_whole_setting() -> None:
    report = simulation(PLAIN)

    course = table(report, "raflora-b0.8, every round", details=True)
    setting = tables(report, details=True)[-1]

    assert [row[0] for row in course.rows] == [str(t) for t in range(1, 21)]
    assert course.rows[0] == ("1", "0.13 ± 0.02", "0.511", "1")
    assert ("ranks", "8x4, 2x32") in setting.rows
    assert ("dirichlet", "1.0") in setting.rows
    assert not any(row[0] in ("model", "data", "classes") for row in setting.rows)


def test_verdicts_are_told_from_good_to_bad() -> None:
    mixed = replace(PLAIN[1], verdicts=("healthy", "at risk", None))

    found = [one for one in paragraphs(simulation([PLAIN[0], mixed, PLAIN[2]])) if ":" in one.text]

    told = [(one.text, one.tone) for one in found[-3:]]
    assert told == [
        ("healthy: raflora (1 of 3), raflora-b0.8", "good"),
        ("at risk: raflora (1 of 3)", "warning"),
        ("collapsed: flexlora", "bad"),
    ]
    assert "healthy: all 2 arms" in prose(simulation(PLAIN[1:]))
    silent = simulation([arm("raflora", verdict=None)])
    assert not any(one.tone != "plain" for one in paragraphs(silent))


@pytest.mark.parametrize(
    ("by_seed", "examples", "expected"),
    [
        (((0.50, 0.60, 0.40), (0.55, 0.64, 0.46)), 10_000, "good"),  # seed by seed
        (((0.50, 0.60, 0.40), (0.55, 0.64, 0.46)), 360, "noise"),  # of so few test examples
        (((0.50, 0.60, 0.40), (0.45, 0.60, 0.60)), 10_000, "noise"),
        (((0.50, 0.60), (0.55, 0.65)), 10_000, "2 seeds cannot"),
        (((0.50, None, None), (None, 0.64, None)), 10_000, "0 seeds cannot"),  # no pairs
        (((0.50, 0.50, 0.50), (0.5001, 0.5001, 0.5001)), 10_000, "noise"),  # however alike
    ],
)
def test_a_lead_is_told_only_where_it_is_more_than_noise(by_seed, examples, expected) -> None:
    low, high = by_seed
    report = simulation(
        [
            arm("flexlora", accuracy=0.50, sd=0.1, by_seed=low),
            arm("raflora", accuracy=0.55, sd=0.1, by_seed=high),
            arm("residual", accuracy=0.40, sd=0.0),
        ],
        test_examples=examples,
    )

    last = paragraphs(report)[-1]
    text = " ".join(last.text.split())

    assert text.startswith("raflora is best at this one learning rate")
    assert report.lead is not None
    assert report.lead.significant == (expected == "good")
    assert (last.tone == "good") == (expected == "good")
    assert bool(re.search(r"5\.0 points above flexlora", text)) == (expected == "good")
    if expected != "good":
        assert {"noise": "within the noise of 3 seeds"}.get(
            expected, f"next; {expected} show"
        ) in text


def test_of_equals_nobody_is_best() -> None:
    alike = [arm(name, accuracy=0.45, by_seed=(0.4, 0.45, 0.5)) for name in ("rbla", "raflora")]

    text = " ".join(paragraphs(simulation(alike))[-1].text.split())
    assert text.startswith("rbla and raflora are level, over 3 seeds")


def test_what_diverges_in_some_runs_does_not_lead() -> None:
    survivors = arm("raflora", accuracy=0.71, by_seed=(None, None, 0.70, 0.71, 0.72))
    survivors = replace(survivors, diverged=(3, 4))
    whole = arm("flexlora", accuracy=0.66, by_seed=(0.5, 0.5, 0.75, 0.76, 0.77))
    report = simulation([whole, survivors])

    text = " ".join(paragraphs(report)[-1].text.split())
    assert text.startswith("flexlora is best")
    assert "within the noise of 3 seeds" in text
    (table, *_) = [b for b in simulate_view(report, details=False).blocks if isinstance(b, Table)]
    assert table.rows[1][1] == "0.71 ± 0.02 (1 of 3)"


def test_a_difference_is_held_against_the_t_distribution_and_the_size_of_the_test() -> None:
    low = arm("flexlora", accuracy=0.5, sd=0.03, by_seed=(0.50, 0.60, 0.40))
    high = arm("raflora", accuracy=0.55, sd=0.04, by_seed=(0.56, 0.63, 0.46))
    gaps = np.array([0.06, 0.03, 0.06])

    lead, margin, seeds = difference(high, low, 10**6)
    _, coarse, _ = difference(high, low, 100)

    assert seeds == 3
    assert lead == pytest.approx(gaps.mean())
    assert margin == pytest.approx(4.30 * gaps.std(ddof=1) / 3**0.5)
    assert coarse == pytest.approx(1.96 * ((0.5 * 0.5 + 0.55 * 0.45) / 100) ** 0.5)
    assert difference(replace(high, by_seed=()), low, 100)[1] is None


def test_one_arm_leads_nobody() -> None:
    assert "best" not in prose(simulation([PLAIN[0]]))
    assert "best" not in prose(simulation([PLAIN[0], diverged(PLAIN[1], 1, 1, 1)]))


def test_a_page_has_the_warnings_and_a_terminal_has_them_elsewhere() -> None:
    report = simulation(PLAIN)

    assert "something to know" not in prose(report)
    assert any(
        one.text == "something to know" and one.tone == "warning"
        for one in paragraphs(report, warnings=True)
    )


def long_names() -> SimulateReport:
    rows = [
        replace(arm(method, accuracy=0.123, ratio=1 - 3e-8), arm=f"{method}-{HOSTILE}")
        for method in ("raflora", "flexlora")
    ]
    return simulation(rows, task=HOSTILE, model=HOSTILE * 3, test_examples=99_999)


def fifteen() -> SimulateReport:
    grid = [(q, b) for q in (0.0, 0.25, 0.5, 0.75, 1.0) for b in (0.0, 0.5, 0.8)]
    return simulation(
        [
            arm("raflora", q, b, accuracy=0.3 + i / 40, ratio=0.99 - i / 50)
            for i, (q, b) in enumerate(grid)
        ]
    )


def nothing_known() -> SimulateReport:
    point = replace(PLAIN[0].rounds[0], energy_ratio=NONE, norm=NONE, accuracy=NONE)
    row = replace(
        PLAIN[0], accuracy=NONE, energy_ratio=NONE, effective_rank=NONE, norm=NONE, gamma=NONE,
        verdicts=(None,) * 3, rounds=(point,),
    )  # fmt: skip
    return simulation([row], rounds=1)


def crossed_with_rates() -> SimulateReport:
    rows = [
        arm("raflora", q, b, rate=rate, best=rate == 1e-3)
        for q in (0.0, 1.0) for b in (0.0, 0.8) for rate in RATES
    ]  # fmt: skip
    lost = [
        diverged(replace(row, rounds=()), 1, 1, 1) if row.quorum and row.momentum else row
        for row in rows
    ]
    return simulation(lost)


def one_rank() -> SimulateReport:
    points = tuple(replace(p, energy_ratio=Spread(1.0, 0.0)) for p in PLAIN[1].rounds)
    row = replace(PLAIN[1], energy_ratio=Spread(1.0, 0.0), rounds=points)
    return simulation([row], ranks=(8,) * 5, shared_rank=8, present=5)


def lost_at_every_rate() -> SimulateReport:
    rows = [diverged(arm("raflora", rate=rate, best=rate == 1e-3), 1, 2, 3) for rate in RATES]
    return simulation(rows, start_accuracy=NONE)


ODD: dict[str, Callable[[], SimulateReport]] = {
    "plain": lambda: simulation(PLAIN),
    "rates": several_rates,
    "grid": grid,
    "grid and rates": crossed_with_rates,
    "one arm, one round, one seed": lambda: simulation([arm("raflora", seeds=1, rounds=1)]),
    "15 arms": fifteen,
    "long names": long_names,
    "nothing known": nothing_known,
    "one rank": one_rank,
    "all diverged": lambda: simulation([diverged(arm("raflora"), 3, 1, 2)], start_accuracy=NONE),
    "all diverged at every rate": lost_at_every_rate,
    "collapsed to rounding": lambda: simulation([arm("flexlora", ratio=1 - 1e-13), PLAIN[1]]),
    "200 rounds": lambda: simulation([arm("raflora", rounds=200)]),
    "never right": lambda: simulation([arm("raflora", accuracy=0.0, sd=0.0)]),
}


@pytest.mark.parametrize("case", ODD)
def test_every_table_fits_80_columns(case: str) -> None:
    for details in (False, True):
        for plain in (False, True):
            console = Console(file=io.StringIO(), width=80)
            console.print(on_terminal(simulate_view(ODD[case](), details=details), plain=plain))
            text = console.file.getvalue()
            assert all(len(line) <= 80 for line in text.splitlines())
            assert "\x1b" not in text
            # No number is cut, only names are, at their beginning.
            assert not re.search(r"[0-9](…|~)|(…|~)\s", text.replace("\n", " ") if plain else text)
            if plain and case not in ("long names",):
                assert text.isascii()


@pytest.mark.parametrize("case", [case for case in ODD if case not in ("plain", "grid")])
def test_what_is_odd_is_drawn_all_the_same(case: str) -> None:
    figure = simulate_figure(ODD[case]())

    drawing = rendered(figure, "svg")

    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert not re.search(rb' (?:d|x|y|transform)="[^"]*(?:nan|inf)', drawing)
    key = next(axes for axes in figure.axes if axes.get_legend())
    assert key.get_legend().get_window_extent().x1 <= figure.bbox.x1
    for axes in figure.axes:
        box = axes.get_position()
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1
        assert axes is key or box.height * figure.get_figheight() > 1


def panel(figure: Figure, title: str) -> Axes:
    found = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    assert len(found) == 1
    return found[0]


def curve(axes: Axes, position: int) -> tuple[list[float], list[float]]:
    line = axes.lines[position]
    return list(line.get_xdata()), list(line.get_ydata())


def note(axes: Axes) -> str:
    return " ".join(text.get_text() for text in axes.texts)


def test_rounds_are_lines_with_bands_and_one_key() -> None:
    report = simulation(PLAIN)

    figure = simulate_figure(report)

    accuracy, energy = panel(figure, "Accuracy by round"), panel(figure, "Energy beyond")
    rounds, values = curve(accuracy, 2)
    assert rounds == list(range(21))
    assert values == [0.1, *(point.accuracy.mean for point in PLAIN[2].rounds)]
    assert len(accuracy.collections) == len(energy.collections) == 3
    assert energy.get_yscale() == "log"
    beyond = curve(energy, 0)[1]
    assert beyond == pytest.approx([1 - point.energy_ratio.mean for point in PLAIN[0].rounds])
    assert beyond[-1] == pytest.approx(0.0021)
    colours = [line.get_color() for line in accuracy.lines]
    assert colours == [line.get_color() for line in energy.lines]
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == [row.arm for row in PLAIN]
    assert [line.get_color() for line in legend.get_lines()] == colours
    assert "± standard deviation" in note(accuracy)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (accuracy, energy))
    assert not any("learning rate" in axes.get_title(loc="left") for axes in figure.axes)


def test_many_arms_look_different_and_have_no_bands() -> None:
    axes = panel(simulate_figure(fifteen()), "Accuracy by round")

    looks = {
        (one.get_color(), one.get_marker(), str(one._unscaled_dash_pattern)) for one in axes.lines
    }
    assert len(looks) == 15
    assert not axes.collections
    assert "±" not in note(axes)


def test_what_is_below_the_scale_is_marked_on_the_axis() -> None:
    axes = panel(simulate_figure(ODD["collapsed to rounding"]()), "Energy beyond")

    (marks,) = [line for line in axes.lines if line.get_marker() == "v"]
    assert set(marks.get_ydata()) == {axes.get_ylim()[0]}
    assert np.max(marks.get_xdata()) == 20
    assert "triangles: below the scale" in note(axes)


def test_rates_are_drawn_with_the_best_and_with_what_diverged() -> None:
    figure = simulate_figure(several_rates())

    axes = panel(figure, "Accuracy by learning rate")

    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0005", "0.001", "0.002"]
    rings = [line for line in axes.lines if line.get_markersize() == 12]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [
        (2e-3, 0.65), (1e-3, 0.6), (1e-3, 0.7),
    ]  # fmt: skip
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [2e-3, 2e-3]
    assert len({line.get_ydata()[0] for line in crosses}) == 2
    assert "crosses at the bottom" in note(axes)
    (legend,) = [one.get_legend() for one in figure.axes if one.get_legend()]
    assert legend.get_texts()[0].get_text() == "flexlora, lr 0.002"


def test_a_grid_is_two_maps_with_their_numbers() -> None:
    figure = simulate_figure(grid())

    accuracy, ratio = panel(figure, "Accuracy of raflora"), panel(figure, "ρ at 4 of raflora")
    assert np.asarray(accuracy.images[0].get_array()) == pytest.approx(
        np.array([[0.5, 0.66], [0.525, 0.685], [0.6, 0.76]])
    )
    assert "0.66" in note(accuracy)
    assert "0.820" in note(ratio)
    assert [label.get_text() for label in ratio.get_yticklabels()] == ["0", "0.25", "1"]
    assert [label.get_text() for label in ratio.get_xticklabels()] == ["0", "0.8"]
    holes = panel(simulate_figure(crossed_with_rates()), "Accuracy of raflora")
    assert "hatched: diverged" in note(holes)
    assert "each at its best rate" in note(holes)


def test_a_picture_says_why_there_is_nothing_in_it() -> None:
    assert "All of it lies in rank index 1-8" in note(
        panel(simulate_figure(one_rank()), "Energy beyond")
    )
    lost = simulate_figure(lost_at_every_rate())
    assert "No round was scored" in note(panel(lost, "Accuracy by round"))
    assert "No round came to its end" in note(panel(lost, "Energy beyond"))
    assert "Every run diverged" in note(panel(lost, "Accuracy by learning rate"))


def test_the_arms_of_a_report_are_those_of_the_options() -> None:
    """The makers above name arms as the options do."""
    assert arm("raflora", 0.5, 0.8).arm == Arm("raflora", 0.5, 0.8).name
