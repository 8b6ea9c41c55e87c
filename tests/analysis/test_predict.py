"""What ranks and sample counts alone tell: against rounds that are really gone through."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.cli
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.adapters import Spec, make

from fedlora_cli import METHODS, PredictOptions, UsageError
from fedlora_cli.analysis.decay import column_sums, energy_factors, energy_ratio, rounds_until
from fedlora_cli.analysis.prediction import population as populations
from fedlora_cli.analysis.prediction.advice import bounding_quorum
from fedlora_cli.analysis.prediction.population import absent, alone, population
from fedlora_cli.analysis.prediction.predict import predict
from fedlora_cli.methods.raflora import with_quorum
from fedlora_cli.methods.weights import Holdings
from fedlora_cli.reports.predict import MethodForecast, PredictReport

ROOT = Path(__file__).parents[2]
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

#: c = 1, .4, .1 at ranks 2, 4, 8.
RANKS, SAMPLES = (2, 4, 8), (60.0, 30.0, 10.0)


run = partial(support.cli.run, "predict")


def of(report: PredictReport, name: str) -> MethodForecast:
    return next(method for method in report.methods if method.name == name)


def holdings(ranks: Any, samples: Any, previous: int = 0) -> Holdings:
    return Holdings(
        np.array(ranks), np.array(samples, dtype=np.float64), np.ones(len(ranks)), previous
    )


# What one round does


def test_column_sums_and_factors_are_those_computed_by_hand() -> None:
    report = predict(RANKS, SAMPLES)
    by_index = [1.0] * 2 + [0.4] * 2 + [0.1] * 4

    assert report.coverage == pytest.approx(by_index)
    assert of(report, "flexlora").column_sums == pytest.approx(by_index)
    assert of(report, "flexlora").energy_factors == pytest.approx([1, 1, 0.16, 0.16] + [0.01] * 4)
    assert of(report, "fedavg").energy_factors == pytest.approx([1, 1, 0.0256, 0.0256] + [1e-4] * 4)
    assert of(report, "ffa").energy_factors == of(report, "flexlora").energy_factors
    thirds = [1, 1] + [2 / 3] * 2 + [1 / 3] * 4
    assert of(report, "hetlora").column_sums == pytest.approx(thirds)
    for name in ("raflora", "residual", "rbla"):
        assert of(report, name).column_sums == (1.0,) * 8
        assert of(report, name).gamma == 1.0
    assert of(report, "flexlora").gamma == pytest.approx(0.16)
    assert of(report, "fedavg").gamma == pytest.approx(0.0256)


def one_round(name: str, B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hand everyone the leading columns, train nothing, aggregate by the papers' formulas."""
    weights = np.zeros((len(RANKS), B.shape[1]))
    for k, rank in enumerate(RANKS):
        for i in range(rank):
            by_samples = SAMPLES[k] / sum(SAMPLES)
            holders = sum(n for n, r in zip(SAMPLES, RANKS, strict=True) if r > i)
            weights[k, i] = SAMPLES[k] / holders if name in ("raflora", "rbla") else by_samples
    padded = [
        (np.where(np.arange(8) < rank, B, 0), np.where(np.arange(8)[:, None] < rank, A, 0))
        for rank in RANKS
    ]
    if name in ("fedavg", "rbla"):
        mean_B: Any = sum(b * w for (b, _), w in zip(padded, weights, strict=True))
        mean_A: Any = sum(a * w[:, None] for (_, a), w in zip(padded, weights, strict=True))
        return mean_B, mean_A
    total = sum(b @ np.diag(w) @ a for (b, a), w in zip(padded, weights, strict=True))
    U, s, Vh = np.linalg.svd(total)
    return U[:, :8] * np.sqrt(s[:8]), np.sqrt(s[:8])[:, None] * Vh[:8]


@pytest.mark.parametrize("name", ["flexlora", "fedavg", "raflora", "rbla"])
def test_the_forecast_is_what_rounds_without_training_come_to(name: str) -> None:
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(size, 8)))[0] for size in (12, 9))
    s = np.linspace(3, 1, 8)
    B, A = U * np.sqrt(s), (V * np.sqrt(s)).T
    start = np.array([np.square(s[:2]).sum(), np.square(s[2:4]).sum(), np.square(s[4:]).sum()])
    factors = energy_factors(METHODS[name], holdings((1, 2, 3), SAMPLES))

    for t in range(1, 4):
        B, A = one_round(name, B, A)
        found = np.square(np.linalg.svd(B @ A, compute_uv=False))
        assert found[:2].sum() / found.sum() == pytest.approx(
            energy_ratio(start, factors, 1, t), rel=1e-9
        )


@EVERY
@given(st.data())
@settings(max_examples=25)
def test_clients_of_one_rank_may_be_taken_together(method: Any, data: st.DataObject) -> None:
    """What the population rests on: rules see the totals of a rank, and the largest of them."""
    count = data.draw(st.integers(1, 8))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    samples = data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    levels = np.unique(ranks, return_inverse=True)[1].reshape(-1) + 1
    everyone = holdings(levels, samples, previous=int(levels.max()))

    merged = population(ranks, samples).everyone()

    assert column_sums(method, merged.holdings) == pytest.approx(column_sums(method, everyone))
    largest = method.rule(merged.holdings).clients[: merged.singles].max()
    assert largest == pytest.approx(method.rule(everyone).clients.max())


@EVERY
def test_no_method_feeds_higher_ranks_from_the_shared_one(method: Any) -> None:
    """What `rounds_until` rests on: ρ never falls."""
    factors = energy_factors(method, holdings((1, 1, 2, 3), (1, 50, 3, 20), previous=3))

    assert factors[0] == 1.0
    assert (factors <= 1.0).all()


# Participation


def expected_by_hand(name: str, ranks: tuple[int, ...], samples: Any, present: int) -> np.ndarray:
    rounds = list(combinations(range(len(ranks)), present))
    factors = [
        energy_factors(
            METHODS[name],
            holdings([ranks[k] for k in one], [samples[k] for k in one], previous=max(ranks)),
        )
        for one in rounds
    ]
    return np.mean(factors, axis=0)


@pytest.mark.parametrize("name", METHODS)
def test_the_expected_factor_is_the_mean_over_all_rounds(name: str) -> None:
    ranks, samples = (1, 1, 2, 2, 3), (5.0, 9.0, 7.0, 7.0, 2.0)
    report = predict(ranks, samples, PredictOptions(participation=0.4))

    assert (report.present, report.draws) == (2, 0)
    expected = expected_by_hand(name, ranks, samples, 2)
    assert of(report, name).energy_factors == pytest.approx(expected)


def test_drawn_rounds_come_near_to_the_mean_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, samples = (1, 1, 1, 1, 2, 2, 2, 3, 3), (5.0, 9, 7, 7, 2, 8, 3, 4, 6)
    exact = predict(ranks, samples, PredictOptions(participation=0.45))
    monkeypatch.setattr(populations, "DRAWS", 100)  # fewer than the 126 there are
    drawn = population(ranks, samples).rounds(4)

    assert sum(one.times for one in drawn) == 100
    times = [one.times for one in drawn]
    factors = [energy_factors(METHODS["flexlora"], one.holdings) for one in drawn]
    mean = np.average(factors, axis=0, weights=times)
    assert mean == pytest.approx(of(exact, "flexlora").energy_factors, abs=0.05)
    assert mean != pytest.approx(of(exact, "flexlora").energy_factors, abs=1e-9)
    again = population(ranks[::-1], samples[::-1]).rounds(4)
    assert all(
        np.array_equal(one.holdings.samples, two.holdings.samples) and one.times == two.times
        for one, two in zip(drawn, again, strict=True)
    )


@pytest.mark.parametrize("present", range(1, 7))
@pytest.mark.parametrize("holders", range(1, 7))
def test_chances_are_those_of_all_rounds_there_can_be(holders: int, present: int) -> None:
    rounds = [sum(k < holders for k in one) for one in combinations(range(6), present)]

    assert absent(6, holders, present) == pytest.approx(rounds.count(0) / len(rounds), abs=1e-15)
    assert alone(6, holders, present) == pytest.approx(rounds.count(1) / len(rounds), abs=1e-15)


def test_the_chance_of_no_holder_is_exact_in_large_federations() -> None:
    exact = math.comb(990, 200) / math.comb(1000, 200)

    assert absent(1000, 10, 200) == pytest.approx(exact, rel=1e-12)
    assert absent(100_000, 60_000, 50_000) == 0.0


def test_without_a_holder_only_those_that_use_the_previous_adapter_keep_anything() -> None:
    report = predict((4, 8), (1, 1), PredictOptions(participation=0.5))

    assert report.partitions[1].absent == 0.5
    assert of(report, "raflora").energy_factors[-1] == 1.0
    assert of(report, "residual").energy_factors[-1] == 1.0
    assert of(report, "rbla").energy_factors[-1] == 0.5
    assert any("--previous: 50 % of the rounds" in line for line in report.advice)


# Rounds to come


@given(
    start=st.floats(0.01, 0.995),
    factors=st.lists(st.floats(0, 0.97), min_size=1, max_size=4),
    threshold=st.sampled_from([0.9, 0.99]),
)
@example(start=0.99, factors=[0.0, 0.0, 0.0], threshold=0.99)
def test_the_round_of_the_collapse_is_the_first_one(start, factors, threshold) -> None:
    energies = np.array([start, *[(1 - start) / len(factors)] * len(factors)])
    every = np.array([1.0, *factors])

    def ratio(t: int) -> float:
        left = energies * every**t
        return float(left[0] / left.sum())

    # A ratio that equals the threshold up to rounding does not exceed it.
    brute = next(t for t in range(10_000) if ratio(t) > threshold * (1 + 1e-9))
    assert rounds_until(threshold, energies, every, 1) == brute


def test_a_decay_however_slow_ends_and_none_never_does() -> None:
    energies = np.array([1.0, 1.0])

    assert rounds_until(0.9, energies, np.array([1.0, 1 - 1e-6]), 1) == 2_197_224
    assert rounds_until(0.9, energies, np.array([1.0, 1.0]), 1) is None
    assert rounds_until(0.9, np.array([1.0, 0.01, 0.01]), np.array([1.0, 1.0, 0.5]), 1) == 0


def test_the_start_is_even_unless_it_is_given() -> None:
    assert predict(RANKS, SAMPLES).start == 0.25
    report = predict(RANKS, SAMPLES, PredictOptions(start=0.6))

    assert report.start == pytest.approx(0.6)
    left = 0.6 / (0.6 + 0.4 * (2 / 6 * 0.16 + 4 / 6 * 0.01))
    assert of(report, "flexlora").energy_ratio[:2] == pytest.approx((0.6, left))


def test_equal_ranks_cannot_collapse() -> None:
    report = predict((8, 8, 8), (5, 6, 7), PredictOptions(start=0.3))

    assert report.start == 1.0
    assert all(method.gamma is None for method in report.methods)
    assert {method.rounds_to_99 for method in report.methods} == {0}
    assert "no rank can collapse" in report.advice[0]


# Advice


def largest_weight(q: float, ranks: tuple[int, ...], samples: tuple[float, ...]) -> float:
    """max n_k / max(N(i), q N), written down again."""
    N = sum(samples)
    return max(
        n / max(sum(m for m, other in zip(samples, ranks, strict=True) if other >= rank), q * N)
        for n, rank in zip(samples, ranks, strict=True)
    )


@given(
    clients=st.lists(
        st.tuples(st.sampled_from([2, 4, 8]), st.integers(1, 50)), min_size=1, max_size=9
    )
)
def test_the_advised_quorum_bounds_every_client_and_a_smaller_one_does_not(clients) -> None:
    ranks, samples = (tuple(column) for column in zip(*clients, strict=True))
    quorums = [step / 100 for step in range(101)]
    rounds = population(ranks, samples).rounds(len(ranks))

    advised = bounding_quorum({q: with_quorum(q) for q in quorums}, rounds)

    most = max(0.5, max(samples) / sum(samples)) * (1 + 1e-12)
    fitting = [q for q in quorums if largest_weight(q, ranks, samples) <= most]
    assert advised == fitting[0]


def test_the_advised_quorum_is_a_row_and_so_is_the_one_asked_for() -> None:
    report = predict(RANKS, SAMPLES, PredictOptions(quorum=0.5))
    even = predict((2, 4, 8, 8), (1, 1, 1, 1))

    # 60 of 100 samples at the shared rank: no quorum changes that, but others have no more then.
    assert any(
        line.startswith("give --quorum 0.5: without it a client of rank 8 has weight 1.000, with "
                        "it no weight exceeds 0.6")
        for line in report.advice
    )  # fmt: skip
    assert of(report, "raflora").largest_weight == 1.0
    assert of(report, "raflora").heaviest_rank == 8
    assert of(report, "raflora, quorum 0.5").largest_weight == pytest.approx(0.6)
    assert of(report, "raflora, quorum 0.5").heaviest_rank == 2
    assert [m.name for m in even.methods] == list(METHODS)
    assert "no quorum needed: no weight of a client exceeds 0.500" in even.advice
    lone = predict((2, 2, 4), (4, 4, 2))
    assert of(lone, "raflora, quorum 0.4").largest_weight == 0.5
    assert any(line.startswith("give --quorum 0.4: without it") for line in lone.advice)


def test_under_participation_the_quorum_holds_in_nearly_all_rounds() -> None:
    ranks, samples = (2,) * 6 + (4,) * 3, (1.0,) * 9
    quorums = [step / 100 for step in range(101)]
    advised = bounding_quorum(
        {q: with_quorum(q) for q in quorums}, population(ranks, samples).rounds(3)
    )

    def share_of_rounds(q: float) -> float:
        rounds = list(combinations(range(9), 3))
        held = [
            largest_weight(q, *zip(*[(ranks[k], samples[k]) for k in one], strict=True)) <= 0.5
            for one in rounds
        ]
        return sum(held) / len(rounds)

    assert share_of_rounds(advised) >= 0.95 > share_of_rounds(advised - 0.01)


def test_the_advice_counts_the_rounds_of_flexlora() -> None:
    report = predict(RANKS, SAMPLES)
    rounds = of(report, "flexlora").rounds_to_99

    assert rounds is not None
    assert f"in rank index 1-2 after {rounds} rounds" in report.advice[0]


# The forecast for a number of rounds


def outlook_by_hand(ranks: tuple[int, ...], factors: np.ndarray, last: int) -> tuple[str, int]:
    """The worst verdict and its rank: every rank index has energy 1 at the start, and `factors` per
    round; the thresholds are those of the documents.
    """
    order = ["healthy", "at risk", "collapsing", "collapsed"]
    worst = ("healthy", min(ranks))
    for rank in sorted(set(ranks))[:-1]:
        shares = [
            sum(f**t for f in factors[rank:]) / sum(f**t for f in factors) for t in range(last + 1)
        ]
        kappa, rate = shares[-1] / shares[0], shares[-1] / shares[-2]
        if kappa <= 0.1:
            found = "collapsed"
        elif kappa * rate**10 <= 0.1:
            found = "collapsing"
        elif kappa <= 0.5 or max(factors[rank:]) < 0.9:
            found = "at risk"
        else:
            found = "healthy"
        if order.index(found) > order.index(worst[0]):
            worst = (found, rank)
    return worst


@pytest.mark.parametrize("rounds", [1, 2, 6, 40])
@pytest.mark.parametrize(
    ("ranks", "samples"),
    [
        (RANKS, SAMPLES),
        ((4, 8, 16), (1.0, 50.0, 50.0)),  # c = 1, .990, .495: slow beyond rank 4, fast beyond 8
        ((4, 8), (5.0, 95.0)),  # c² = .9025, no risk at first
        ((4, 8), (6.0, 94.0)),  # c² = .8836, at risk from the first round on
        ((4, 4, 8, 32), (3.0, 3.0, 2.0, 2.0)),
    ],
)
def test_the_rounds_and_the_verdict_are_those_of_the_closed_form(
    ranks: tuple[int, ...], samples: tuple[float, ...], rounds: int
) -> None:
    report = predict(ranks, samples, PredictOptions(rounds=rounds))
    coverage = [
        sum(n for n, r in zip(samples, ranks, strict=True) if r > i) / sum(samples)
        for i in range(max(ranks))
    ]

    assert report.rounds == rounds
    for name, powers in (("flexlora", 2), ("fedavg", 4), ("raflora", 0)):
        factors = np.array(coverage) ** powers
        method = of(report, name)
        assert len(method.energy_ratio) == rounds + 1
        for t, ratio in enumerate(method.energy_ratio):
            left = factors**t
            assert ratio == pytest.approx(left[: min(ranks)].sum() / left.sum(), rel=1e-12)
        assert (method.verdict, method.beyond) == outlook_by_hand(ranks, factors, rounds)
        left = factors**rounds
        beyond = left[method.beyond :].sum() / left.sum() / (1 - method.beyond / max(ranks))
        assert method.kept == pytest.approx(beyond, rel=1e-9)


def test_the_verdicts_of_some_rounds_written_down() -> None:
    """c = 1, 1/2 at ranks 4, 8: κ = 2 / (4^t + 1), which is 0.4, 0.118, 0.031."""
    seen = [of(predict((4, 8), (1, 1), PredictOptions(rounds=t)), "flexlora") for t in (1, 2, 3)]

    assert [one.verdict for one in seen] == ["collapsing", "collapsing", "collapsed"]
    assert [one.kept for one in seen] == pytest.approx([2 / 5, 2 / 17, 2 / 65])
    assert [one.energy_ratio[-1] for one in seen] == pytest.approx([4 / 5, 16 / 17, 64 / 65])
    reason = "3.08 % of the clients' energy share beyond rank 4 is left; 10 % or less is collapsed"
    assert seen[2].reason == reason


def test_equal_ranks_have_no_verdict_and_keep_their_energy() -> None:
    report = predict((8, 8), (1, 2), PredictOptions(rounds=3))

    assert all(method.energy_ratio == (1.0,) * 4 for method in report.methods)
    assert {(method.verdict, method.reason, method.beyond) for method in report.methods} == {
        (None, None, None)
    }


def test_without_a_number_of_rounds_the_forecast_is_as_long_as_the_collapse() -> None:
    report = predict(RANKS, SAMPLES)

    assert report.rounds is None
    assert all(method.verdict is None for method in report.methods)
    assert {len(method.energy_ratio) for method in report.methods} == {11}


def test_the_command_shows_the_rounds_and_the_verdict_in_the_last() -> None:
    plain = ("--ranks", "4,8", "--samples", "1,1")
    shown = run(*plain, "--rounds", "3").stdout
    found = document(*plain, "--rounds", "3")
    flexlora = next(method for method in found["methods"] if method["name"] == "flexlora")

    assert re.search(r"^method +0 +1 +2 +3$", shown, re.M)
    assert re.search(r"^flexlora +0\.5000  0\.8000  0\.9412  0\.9846$", shown, re.M)
    assert "Verdict in round 3\n" in shown
    assert re.search(r"^flexlora +collapsed +4 +3\.1 %$", shown, re.M)
    assert found["rounds"] == 3
    assert flexlora["energy_ratio"] == pytest.approx([1 / 2, 4 / 5, 16 / 17, 64 / 65])
    assert (flexlora["verdict"], flexlora["beyond"]) == ("collapsed", 4)
    assert "rounds" not in document(*plain)
    assert "Verdict" not in run(*plain).stdout
    assert "Verdict" not in run("--cohort", "3x4", "--rounds", "3").stdout


def test_many_rounds_are_shown_in_steps_and_all_with_verbose() -> None:
    plain = ("--ranks", "4,8", "--samples", "1,1", "--rounds", "20")
    steps = run(*plain).stdout
    every = run(*plain, "-v").stdout

    assert re.search(r"^method +0 +4 +8 +12 +16 +20$", steps, re.M)
    assert re.search(r"^ +6 +0\.99976 ", every, re.M)
    assert len(document(*plain)["methods"][0]["energy_ratio"]) == 21


@pytest.mark.parametrize("rounds", ["0", "-1", "1001"])
def test_a_number_of_rounds_out_of_its_range_is_one_line(rounds: str) -> None:
    result = run("--ranks", "4,8", "--rounds", rounds)

    assert result.exit_code == 2
    assert result.stderr == (
        f"error: --rounds: {rounds} is out of range; it must be from 1 to 1000\n"
    )


# The command


def document(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=pytest.fail)


def test_json_keeps_the_keys_that_others_build_on() -> None:
    found = document("--ranks", "2,4,8", "--samples", "60,30,10")

    assert found["schema"] == "fedlora.predict/1"
    assert (found["ranks"], found["samples"]) == ([2, 4, 8], [60.0, 30.0, 10.0])
    assert len(found["coverage"]) == 8
    for method in found["methods"]:
        assert set(method) >= {"name", "column_sums", "gamma", "rounds_to_99"}
        assert len(method["column_sums"]) == 8
    assert next(m for m in found["methods"] if m["name"] == "raflora")["rounds_to_99"] is None


def test_a_folder_of_clients_is_its_ranks_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = document("samples/round-01", "--participation", "0.5")
    ranks = ",".join(map(str, folder["ranks"]))
    samples = ",".join(map(str, folder["samples"]))

    assert folder["ranks"] == [4, 16, 2, 8, 2, 16, 8, 4]
    assert document("--ranks", ranks, "--samples", samples, "-p", "0.5") == folder


def test_counts_of_a_folder_may_come_from_a_file(tmp_path: Path) -> None:
    for name, rank in (("ann", 2), ("bob", 4)):
        make(tmp_path / "round", Spec(name, rank=rank, samples=1))
    (tmp_path / "counts.csv").write_text("bob,30\nann,10\n")

    found = document(str(tmp_path / "round"), "--samples", str(tmp_path / "counts.csv"))

    assert (found["ranks"], found["samples"]) == ([2, 4], [10.0, 30.0])
    assert run(str(tmp_path / "nowhere")).exit_code == 3


def test_where_one_client_makes_a_round_no_quorum_is_needed() -> None:
    """It has all the weight, and all the samples."""
    report = predict((4, 4), (1, 1), PredictOptions(participation=0.5))

    assert report.advice[1].startswith(
        "no quorum needed: in 95 % of the rounds no client exceeds half"
    )


def test_groups_are_their_clients() -> None:
    groups = document("--cohort", "3x4:20, 2x8:7.5")

    assert groups == document("--ranks", "4,4,4,8,8", "--samples", "20,20,20,7.5,7.5")
    uniform = run("--cohort", "3x4,2x8", "-q", "--json")
    assert json.loads(uniform.stdout)["samples"] == [1.0] * 5
    assert "all clients count the same" in run("--cohort", "3x4,2x8").stderr


def test_modules_that_differ_in_rank_count_with_the_largest(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("ann", rank=2, samples=3))
    make(tmp_path / "round", Spec("bob", rank=4, samples=1, ranks={"layers.0.v_proj": 3}))

    result = run(str(tmp_path / "round"), "--json")

    assert json.loads(result.stdout)["ranks"] == [2, 4]
    assert "modules of bob differ in rank" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ranks", "2,4,8", "--samples", "60,30,10", "--quorum", "0.123456"),
        ("--ranks", "2,4,8", "--samples", "60,30,10", "--quorum", "0.123456", "--rounds", "6"),
        ("--ranks", "2,4,8", "--samples", "60,30,10", "--rounds", "1000"),
        ("--ranks", "7,7"),
        ("--ranks", "5"),
        ("--cohort", "40x4,30x8,20x16,10x1024,1x4096", "-p", "0.1"),
        ("--ranks", ",".join(str(r) for r in range(1000, 4000, 100)), "-p", "0.3"),
    ],
)
@pytest.mark.parametrize("verbose", [(), ("-v",)])
def test_it_fits_into_80_columns_without_colour(arguments, verbose) -> None:
    result = run(*arguments, *verbose)

    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert verbose or "…" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert all(name in result.stdout for name in METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no clients; give one of CLIENTS, --ranks"),
        (("--ranks", "4", "--cohort", "1x4"), "--ranks and --cohort together"),
        (("folder", "--ranks", "4"), "CLIENTS and --ranks together"),
        (("--ranks", "4,x"), "'x' is no number; give whole numbers"),
        (("--ranks", "4,0"), "a rank of 0; ranks are 1 to 4096"),
        (("--ranks", "4097"), "a rank of 4097"),
        (("--ranks", "4", "--samples", "1,2"), "2 counts for 1 clients"),
        (("--ranks", "4", "--samples", "counts.csv"), "'counts.csv' is no number"),
        (("--ranks", "4", "--samples", "0"), "all counts are zero"),
        (("--ranks", "4", "--samples", "nan"), "counts are 0 to 1e+12"),
        (("--ranks", "4", "--samples", "inf"), "counts are 0 to 1e+12"),
        (("--cohort", "4x"), "'4x' is no group"),
        (("--cohort", "4x4:1,4x8"), "counts for some groups only"),
        (("--cohort", "999999999x4"), "999999999 clients; give up to 100000"),
        (("--cohort", "0x4"), "0 clients; give 1 to"),
        (("--cohort", "4x4", "--samples", "1"), "write counts there"),
        (("--ranks", "4", "-p", "0"), "--participation: 0.0 is out of range"),
        (("--ranks", "4", "-p", "nan"), "--participation: nan is out of range"),
        (("--ranks", "4", "--start", "1"), "--start: 1.0 is out of range"),
        (("--ranks", "4", "--quorum", "1.5"), "--quorum: 1.5 is out of range"),
        (("--ranks", ",".join(map(str, range(1, 200)))), "199 different ranks"),
        (("--ranks", "4", "--plot", "a.gif"), "has no known ending"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message) -> None:
    result = run(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_library_refuses_what_the_command_refuses() -> None:
    with pytest.raises(UsageError, match="2 counts for 1 clients"):
        predict([4], [1, 2])


def test_neither_torch_nor_matplotlib_is_imported_for_numbers() -> None:
    program = (
        "import sys\n"
        "from fedlora_cli.cli import app\n"
        "try: app(['predict', '--cohort', '3x4,2x8', '-p', '.5'], prog_name='fedlora')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'peft', 'matplotlib', 'transformers', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "raflora" in done.stdout


def test_the_picture_merges_methods_that_agree() -> None:
    from fedlora_cli.render.figures.canvas import rendered
    from fedlora_cli.render.figures.predict import predict_figure

    report = predict((2, 2, 4, 4), (4, 4, 2, 3))
    lines, heat = predict_figure(report).axes[:2]

    labels = [text.get_text().replace("\n", " ") for text in lines.get_legend().get_texts()]
    assert labels[0].startswith("raflora, residual, rbla")
    assert "flexlora, flora, ffa" in labels
    assert [text.get_text().replace("\n", " ") for text in heat.get_yticklabels()] == labels
    assert lines.get_xlabel() == "round"
    one, two = (rendered(predict_figure(report), "svg") for _ in range(2))
    assert one == two


def test_rounding_neither_reaches_a_threshold_nor_leaves_out_clients() -> None:
    for ranks in ((1, 3, 3, 8, 2), (3, 1, 5), (1, 2, 9)):
        report = predict(ranks, (1.0,) * len(ranks), PredictOptions(start=0.9))
        assert of(report, "raflora").rounds_to_90 is None
        assert (
            of(
                predict(ranks, (1.0,) * len(ranks), PredictOptions(start=0.99)), "flexlora"
            ).rounds_to_99
            == 1
        )
    assert predict((4, 8, 16), (1, 1, 1), PredictOptions(participation=0.6)).present == 2


def test_weights_by_rank_are_those_of_the_rules() -> None:
    report = predict((2, 4, 4, 8), (60.0, 20.0, 10.0, 10.0))

    assert of(report, "flexlora").weights == (
        pytest.approx((0.6, 0, 0)), pytest.approx((0.3, 0.3, 0)), pytest.approx((0.1, 0.1, 0.1)),
    )  # fmt: skip
    assert of(report, "raflora").weights == (
        pytest.approx((0.6, 0, 0)), pytest.approx((0.3, 0.75, 0)), pytest.approx((0.1, 0.25, 1)),
    )  # fmt: skip
    sums = np.sum(of(report, "raflora").weights, axis=0)
    np.testing.assert_allclose(np.repeat(sums, (2, 2, 4)), of(report, "raflora").column_sums)
