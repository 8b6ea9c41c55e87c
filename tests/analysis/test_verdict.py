"""The verdict and the rates, on rounds that are numbers: what was lost, and what was not."""

from __future__ import annotations

import pytest

from fedlora_cli.analysis.diagnosis.judgement import Judgement, judge_series
from fedlora_cli.analysis.diagnosis.remarks import series_remarks
from fedlora_cli.analysis.diagnosis.trend import clients_beyond, energy_factors_by_round, fit
from fedlora_cli.analysis.diagnosis.verdict import judge, kept
from fedlora_cli.reports.diagnose import AdapterRow
from fedlora_cli.reports.provenance import Contributor, Provenance


def told(ranks: list[int], samples: list[float], energy: list[list[float]], **given) -> Provenance:
    """What a global adapter's report would say of such clients."""
    clients = zip("abcdefgh", ranks, samples, energy, strict=False)
    facts = {"quorum": None, "previous": False, "momentum": False, "uniform": True} | given
    return Provenance(
        method=facts.pop("method", "flexlora"),
        version="1",
        shared_rank=min(ranks),
        clients=tuple(Contributor(n, r, s, tuple(e)) for n, r, s, e in clients),
        **facts,
    )


def row(energy: list[float]) -> AdapterRow:
    return AdapterRow(
        "r", "r", len(energy), None, None, None, 1, 1, 1, 1, 1, 0, 1, 1, tuple(energy), (), ()
    )


def judged(energies: list[list[float]], origins: list[Provenance], rank: int) -> Judgement:
    rows = [row(energy) for energy in energies]
    return judge_series(rows, origins, energy_factors_by_round(rows, origins), rank)


@pytest.mark.parametrize(
    ("left", "predicted", "verdict", "course"),
    [
        ([0.05], 0.3, "at risk", ""),  # one round is no trend
        ([0.05, 0.2], 0.3, "at risk", "recovering"),
        ([0.05, 0.08], 0.3, "at risk", "recovering"),
        ([0.05, 0.052], 0.3, "collapsed", ""),
        ([0.05, 0.052], None, "collapsed", ""),
        ([0.05, 0.052], 1.0, "at risk", "and steady"),  # not the weights
        ([0.3, 0.05], 1.0, "collapsed", ""),
        ([0.1, 0.1], 0.3, "collapsed", ""),  # one tenth is not more than a tenth
        ([0.9, 0.7, 0.5], 1.0, "collapsing", ""),
        ([0.165, 0.19, 0.19, 0.176, 0.163, 0.154], 1.0, "at risk", "and steady"),
        ([0.165, 0.19, 0.19, 0.176, 0.163, 0.154], 0.3, "collapsing", ""),
        ([0.5, 0.2, 0.19], 1.0, "collapsing", ""),
        ([0.9, 0.88, 0.86], 1.0, "healthy", ""),
        ([0.9, 0.88, 0.86], 0.9, "healthy", ""),
        ([0.9, 0.88, 0.86], 0.89, "at risk", "multiply it by 0.89"),
        ([0.6, 0.55, 0.5], 1.0, "at risk", "and steady"),
        # Up and down is no recovery: what counts is where it goes.
        ([0.02, 0.0, 0.02, 0.0, 0.02], 0.3, "collapsed", ""),
        ([1, 0.4, 0.6, 0.2, 0.3, 0.1, 0.16, 0.06, 0.08], 0.3, "collapsed", ""),
        ([0.0017, 0.0017, 0.0017, None, 0.0017], 0.3, "collapsed", ""),
        ([0.9, None, 0.05], 0.3, "collapsed", ""),
        ([0.05, 0.1, 0.2, 0.0], 0.3, "collapsed", ""),  # whatever it was on the way to
        ([0.0, 0.05], 0.3, "at risk", "recovering"),
        ([0.0, 0.0], 1.0, "collapsed", ""),  # nothing is not steady
    ],
)
def test_the_verdict_looks_at_direction(
    left: list[float | None], predicted: float | None, verdict: str, course: str
) -> None:
    found, reason = judge(left, fit(left)[1], predicted, beyond=2)

    assert found == verdict
    assert course in reason
    assert ("recovering" in reason) == (course == "recovering")


def test_a_small_client_does_not_hide_what_happens_above_its_rank() -> None:
    """Ranks 1, 2 and 4 with samples 1, 98, 1: nearly all holds rank 2, and hardly anyone more."""
    own = [[1.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    origin = told([1, 2, 4], [1, 98, 1], own)
    globals_ = [[1.0, 0.98, 1e-4, 1e-4], [1.0, 0.96, 1e-8, 1e-8], [1.0, 0.94, 1e-12, 1e-12]]

    found = judged(globals_, [origin] * 3, rank=1)

    assert found.verdict == "collapsed"
    assert found.course.rank == 2
    assert "beyond rank 2" in found.reason


def test_an_absent_high_rank_client_is_missed_although_others_exceed_the_shared_rank() -> None:
    whole = told([1, 2, 4], [1, 1, 1], [[1.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    without = told([1, 2], [1, 1], [[1.0], [1.0, 1.0]], method="raflora")

    found = judged([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], [whole, without], rank=1)

    assert (found.verdict, found.course.rank) == ("collapsed", 2)


@pytest.mark.parametrize(
    ("brought", "beyond"),
    [
        ([0.6] + [0.061] * 60, [0.59] + [0.06] * 60),  # early noise, then steady
        ([0.5 * 0.95**t for t in range(60)],
         [0.5 * 0.95**t * (1.1 if t % 2 else 0.9) for t in range(60)]),
        ([1e-12] * 5, [1e-14] * 5),  # nothing but rounding
        ([0.3] * 60, [0.27] * 60),  # training restores what every aggregation takes
    ],
    ids=["early noise", "noisy and concentrating", "rounding", "steady"],
)  # fmt: skip
def test_no_collapse_where_nothing_was_lost(brought: list[float], beyond: list[float]) -> None:
    left = kept(beyond, brought)

    assert left[-1] >= 0.85
    assert judge(left, fit(left)[1], 1.0, 2)[0] == "healthy"


def test_what_is_left_is_measured_against_what_nobody_took() -> None:
    untrained = [0.5 * 0.5**t for t in range(8)]  # e_t is h of the round before
    left = kept(untrained[1:], untrained[:-1])

    assert left == pytest.approx([0.5**t for t in range(1, 8)])
    # Clients that give up half by themselves, while half of the rest is taken.
    assert kept([0.5, 0.125], [0.5, 0.25]) == [1.0, 0.5]
    # Nobody above the rank: what the round before had.
    assert kept([0.4, 0.4, 0.2], [0.5, None, None]) == pytest.approx([0.8, 0.8, 0.4])
    assert kept([0.4, None, 0.2], [0.4, 0.4, 0.4]) == [1.0, None, 0.5]


def test_what_clients_bring_is_averaged_by_samples() -> None:
    clients = told([2, 4, 4], [9, 3, 1], [[5.0, 5.0], [1, 1, 1, 1], [1, 0, 0, 0]]).clients

    assert clients_beyond(clients, 2) == pytest.approx(0.75 * 0.5)
    assert clients_beyond(clients, 4) is None


def test_the_predicted_rate_knows_quorum_previous_and_rounds() -> None:
    own = [[1.0], [1.0, 1.0]]
    few = told([1, 2], [3, 1], own)
    many = told([1, 2], [1, 3], own)

    def predicted(origins: list[Provenance], energies: list[list[float]]) -> float | None:
        return judged(energies, origins, 1).course.predicted_gamma

    pair = [[1.0, 1.0]] * 2
    assert predicted([few, few], pair) == pytest.approx(1 / 16)
    # The first of several rounds had nothing to shrink.
    assert predicted([many, few], pair) == pytest.approx(1 / 16)
    assert predicted([few], pair[:1]) == pytest.approx(1 / 16)
    half = told([1, 2], [3, 1], own, method="raflora", quorum=0.5)
    assert predicted([half, half], pair) == pytest.approx(1 / 4)
    residual = told([1, 2], [3, 1], own, method="residual", previous=True)
    assert predicted([few, residual], pair) == pytest.approx(1)
    # A previous adapter of rank 1 cannot fill what it never had.
    assert predicted([few, residual], [[1.0], [1.0, 1.0]]) == pytest.approx(1 / 16)


def test_the_horizon_and_the_window_are_what_the_readme_says() -> None:
    slow, fast = 0.1 ** (1 / 10.5), 0.1 ** (1 / 9.5)  # reach 0.1 after 10.5 and 9.5 rounds

    assert judge([1.0, 0.99, 0.98], slow / 0.98 ** (1 / 10), 1.0, 2)[0] == "healthy"
    assert judge([1.0, 0.99, 0.98], fast / 0.98 ** (1 / 10), 1.0, 2)[0] == "collapsing"
    values = [1.0, 0.9, 0.3, 0.2, 0.1, 0.05, 0.025]
    start, rate, _ = fit(values)
    assert (start, rate) == (4, pytest.approx(0.5))  # 0.2, 0.1, 0.05, 0.025: the later half
    assert fit([1.0, 0.5]) == (None, None, None)


def test_of_verdicts_as_bad_the_lowest_rank_is_shown() -> None:
    own = [[1.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    origin = told([1, 2, 4], [8, 1, 1], own)
    fading = [[1.0, 0.1**t, 0.1**t, 0.1**t] for t in range(1, 5)]

    found = judged(fading, [origin] * 4, rank=1)

    assert (found.verdict, found.course.rank) == ("collapsed", 1)
    # Not below the shared rank that was asked for.
    assert judged(fading, [origin] * 4, rank=2).course.rank == 2


def test_a_share_above_what_was_brought_counts_as_all_of_it() -> None:
    assert kept([0.9, 0.9], [0.3, 0.3]) == [1.0, 1.0]
    # A round without any energy does not make one forget the round before it.
    assert kept([0.4, None, 0.1], [0.4, 0.4, 0.2]) == [1.0, None, 0.5]
    assert kept([0.5, 0.0, 0.4], [0.5, 0.5, 0.4]) == pytest.approx([1.0, 0.0, 0.8])
    assert kept([2e-6, 1e-6], [4e-6, 4e-6]) == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize(
    ("names", "gaps"),
    [
        (["round-1", "round-3"], True),
        (["run1-round-1", "run1-round-9"], True),
        (["seed7", "round-9"], False),
        (["round-1", "round-2"], False),
        (["round-3", "round-1"], False),
    ],
)
def test_gaps_are_those_of_one_numbering(names: list[str], gaps: bool) -> None:
    remarks = series_remarks(names, [None] * len(names))

    assert any("rounds are missing" in remark for remark in remarks) == gaps


def test_hetlora_is_predicted_by_the_norms_of_the_clients() -> None:
    """Norms 3 and 1: the second client has a quarter of the weight, in both factors."""
    origin = told([1, 2], [1, 1], [[9.0], [0.5, 0.5]], method="hetlora")

    found = judged([[1.0, 1.0]] * 2, [origin] * 2, rank=1)

    assert found.course.predicted_gamma == pytest.approx(0.25**4)
