"""How far a few attackers move the global adapter, with and without what is there against it.

`PYTHONPATH=tests python tests/robust/test_attacks.py` measures ROUNDS rounds, takes minutes, and
writes `samples/attacks.json`, from which a table in the documents is made.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.attacks import ATTACKS, HEAD, RANKS, F, Scene, head_1000, scene, write_all
from support.readme_attacks import MORE, PLACE

from fedlora_cli import Adapter, AggregateOptions, Cohort, InputError, aggregate, read, read_clients
from fedlora_cli.aggregation.bounds import bounded, is_bounded
from fedlora_cli.aggregation.plan import Plan, make_plan
from fedlora_cli.aggregation.reading import read_terms
from fedlora_cli.aggregation.sums import weighted_sum
from fedlora_cli.clients.cohort import align
from fedlora_cli.clients.tensor_checks import look_at
from fedlora_cli.execution import engine
from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.rounds.tensors import average_tensor

#: How many rounds are in the JSON; the tests repeat the first one.
ROUNDS = 16

_TOGETHER = AggregateOptions(quorum=0.5, missing="zero", clip_norm="auto")

#: The defenses of `aggregate`, by their names in SECURITY.md.
DEFENCES = {
    "none": AggregateOptions(),
    "quorum 0.5": AggregateOptions(quorum=0.5),
    "max weight 0.1": AggregateOptions(max_weight=0.1),
    "clip": AggregateOptions(clip_norm="auto"),
    "Multi-Krum": AggregateOptions(robust="multi-krum", attackers=F),
    "geometric median": AggregateOptions(robust="geometric-median"),
    "together, Multi-Krum": replace(_TOGETHER, robust="multi-krum", attackers=F),
    "together, median": replace(_TOGETHER, robust="geometric-median"),
}
MEDIAN, KRUM = "together, median", "together, Multi-Krum"


@dataclass(frozen=True, eq=False)
class Round:
    """One round on disk: the honest clients alone, and the global adapter of the round before."""

    place: Path
    scene: Scene
    honest: Cohort
    previous: Adapter


def make_round(place: Path, seed: int) -> Round:
    found = scene(seed)
    write_all(found.earlier, place / "earlier", "honest")
    aggregate([place / "earlier"], place / "previous", AggregateOptions(jobs=1))
    write_all(found.honest, place / "honest", "honest")
    honest = read_clients([place / "honest"]).cohort
    return Round(place, found, honest, read(place / "previous"))


@cache
def attacked(one: Round, attack: str) -> Cohort:
    """The honest clients and the attackers, from their files."""
    place = one.place / f"attack-{[MORE, *ATTACKS].index(attack):02}"
    if not place.exists():
        uploads = list(one.scene.own) if attack == MORE else ATTACKS[attack](one.scene)
        write_all(uploads, place, "upload")
    cohort = read_clients([one.place / "honest", place]).cohort
    # As `--on-bad-client skip` leaves them out.
    looks = look_at([client.adapter for client in cohort.clients], 1, engine.quiet(""))
    bad = {fault.path for look in looks for fault in look.faults}
    return align([client for client in cohort.clients if client.adapter.path not in bad])


def planned(cohort: Cohort, options: AggregateOptions, previous: Adapter) -> Plan:
    plan = make_plan(cohort, options, previous)
    return bounded(plan, 1, engine.quiet("")) if is_bounded(plan) else plan


Values = dict[str, FloatArray]


def update(plan: Plan) -> Values:
    """The global update before it is truncated, by module."""
    sums = {}
    for name in plan.modules:
        [found] = read_terms(plan, [name])
        rule = plan.rule(plan.holdings(name, found.norms))
        target = weighted_sum(plan, found, rule)
        terms = zip(target.terms, target.weights, strict=True)
        dense = [one.scale * (one.B.double() * w) @ one.A.double() for one, w in terms]
        sums[name] = np.asarray(sum(dense[1:], dense[0]))
    return sums


def head(plan: Plan) -> Values:
    return {HEAD: np.asarray(average_tensor(plan, HEAD).double())}


@cache
def alone(one: Round, options: AggregateOptions, of: Callable[[Plan], Values]) -> Values:
    """What the honest clients give."""
    return of(planned(one.honest, options, one.previous))


def away(found: Values, expected: Values) -> float:
    """‖found - expected‖ / ‖expected‖ over all modules; zero is expected of any others."""
    apart = sum(float(np.square(one - expected.get(m, 0.0)).sum()) for m, one in found.items())
    return float((apart / sum(float(np.square(one).sum()) for one in expected.values())) ** 0.5)


def movement(one: Round, attack: str, options: AggregateOptions) -> float:
    """How far the global adapter moves from that of the honest clients alone, all of them trusted:
    of the update, or of the head where that is attacked.
    """
    of = head if ATTACKS.get(attack) is head_1000 else update
    trusting = replace(options, robust=None, attackers=None)
    found = of(planned(attacked(one, attack), options, one.previous))
    return away(found, alone(one, trusting, of))


def cost(one: Round, options: AggregateOptions) -> float:
    """How far a defence moves the update of honest clients from that without any."""
    return away(alone(one, options, update), alone(one, AggregateOptions(), update))


def trust_by_rank(one: Round, options: AggregateOptions) -> dict[str, float]:
    """The mean trust in honest clients among themselves."""
    trust = planned(one.honest, options, one.previous).trust
    assert trust is not None
    return {str(rank): float(trust[np.array(RANKS) == rank].mean()) for rank in sorted(set(RANKS))}


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Round:
    return make_round(tmp_path_factory.mktemp("round"), seed=0)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(PLACE.read_text())
    return document


@pytest.mark.parametrize("attack", [MORE, *ATTACKS])
def test_an_attack_moves_the_global_adapter_as_far_as_was_measured(
    attack: str, first: Round, measured: dict[str, Any]
) -> None:
    found = {name: movement(first, attack, options) for name, options in DEFENCES.items()}
    expected = {name: cell["first"] for name, cell in measured["movement"][attack].items()}

    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_defences_cost_as_much_as_was_measured(first: Round, measured: dict[str, Any]) -> None:
    found = {name: cost(first, options) for name, options in DEFENCES.items()}

    assert found == pytest.approx(
        {name: cell["first"] for name, cell in measured["cost"].items()}, rel=1e-3, abs=1e-6
    )


def worst(measured: dict[str, Any], attack: str) -> dict[str, float]:
    return {name: cell["worst"] for name, cell in measured["movement"][attack].items()}


def test_what_was_measured_is_of_these_attacks_and_defences(measured: dict[str, Any]) -> None:
    assert list(measured["movement"]) == [MORE, *ATTACKS]
    assert measured["rounds"] == ROUNDS
    for row in (measured["cost"], *measured["movement"].values()):
        assert list(row) == list(DEFENCES)
        assert all(cell["first"] <= cell["worst"] for cell in row.values())


#: Where a combination does not hold what it does elsewhere: six attackers instead of two, counts
#: that only the server can know, heads that no rule looks at.
UNHELPED = {
    MEDIAN: ["sign flip by 6 sybils", "sign flip, 90 × the samples", "head × 1000"],
    KRUM: ["sign flip by 6 sybils", "head × 1000"],
}


@pytest.mark.parametrize("defence", [MEDIAN, KRUM])
def test_two_attackers_move_a_defended_global_adapter_by_a_third_at_most(
    defence: str, measured: dict[str, Any]
) -> None:
    moved = {attack: worst(measured, attack)[defence] for attack in measured["movement"]}
    above = [attack for attack, far in moved.items() if far > 1 / 3]

    assert above == UNHELPED[defence]
    assert measured["cost"][defence]["worst"] < 0.3


def test_multi_krum_excludes_whoever_is_plainly_another(measured: dict[str, Any]) -> None:
    for attack in ("update × 1000", "sign flip", "sign flip, 90 × the samples"):
        assert worst(measured, attack)["Multi-Krum"] < 1e-9


def test_what_the_readme_says_of_single_defences(measured: dict[str, Any]) -> None:
    huge, lone = worst(measured, "update × 1000"), worst(measured, "rank 48, one client")
    hidden, zero = worst(measured, "min-max collusion"), worst(measured, "zero update")
    own = worst(measured, "a module that no other client has")
    counts, sybils = (
        worst(measured, name) for name in ("sign flip, 90 × the samples", "sign flip by 6 sybils")
    )

    # A quorum or a largest weight for the rank that one client holds alone; the clip does nothing.
    assert max(lone["quorum 0.5"], lone["max weight 0.1"]) < lone["none"] / 3
    assert min(lone["clip"], lone["geometric median"]) > 0.97 * lone["none"]
    # So for a module that one client has alone, but that a quorum needs `--missing zero` there.
    assert own["max weight 0.1"] < 0.2 * own["none"]
    assert min(own["quorum 0.5"], own["Multi-Krum"], own["geometric median"]) > 0.9 * own["none"]
    # The clip for what is large; quorum and largest weight do nothing.
    assert huge["clip"] < 0.005 * huge["none"]
    assert min(huge["quorum 0.5"], huge["max weight 0.1"]) > 0.5 * huge["none"]
    # Trust makes worse what hides among the honest, and more attackers than were told of.
    assert hidden["Multi-Krum"] > hidden["none"]
    assert zero["Multi-Krum"] < 1e-9
    assert sybils["Multi-Krum"] > sybils["none"]
    # The median is that of the samples, whoever tells them.
    assert counts["geometric median"] > counts["none"]
    assert counts["max weight 0.1"] < 0.5 * counts["none"]


def test_honest_clients_of_every_rank_are_trusted(measured: dict[str, Any]) -> None:
    trusted = measured["trust"]

    # Multi-Krum leaves out F of K whatever they are; no rank bears twice its share.
    assert all(one > 1 - 2 * F / len(RANKS) for one in trusted["Multi-Krum"].values())
    median = trusted["geometric median"].values()
    assert min(median) > 0.9 * max(median)
    assert min(median) > 0.8


@pytest.mark.parametrize(
    "options",
    [
        AggregateOptions(method="flexlora"),
        AggregateOptions(basis="svd"),
        replace(DEFENCES[MEDIAN], basis="svd"),
        replace(DEFENCES[KRUM], basis="svd"),
    ],
    ids=["flexlora", "svd", "svd-median", "svd-krum"],
)
def test_another_basis_is_no_attack_where_the_basis_does_not_matter(
    options: AggregateOptions, first: Round
) -> None:
    honest = update(planned(attacked(first, MORE), options, first.previous))
    for attack in ("basis (10⁶ B, 10⁻⁶ A)", "basis (B Q, Qᵀ A)"):
        found = update(planned(attacked(first, attack), options, first.previous))
        assert away(found, honest) < 1e-5


def test_another_basis_moves_raflora_as_stored(first: Round) -> None:
    honest, blown, scrambled = (
        update(planned(attacked(first, attack), AggregateOptions(), first.previous))
        for attack in (MORE, "basis (10⁶ B, 10⁻⁶ A)", "basis (B Q, Qᵀ A)")
    )

    assert away(blown, honest) < 1e-6
    assert away(scrambled, honest) > 0.05


def test_byte_identical_sybils_are_refused_and_others_count(first: Round, tmp_path: Path) -> None:
    uploads = [first.scene.own[0]] * 2
    copies = write_all(uploads, tmp_path / "copies", "sybil")
    paths = [first.place / "honest", copies]
    with pytest.raises(InputError, match="sybil-0"):
        aggregate(paths, tmp_path / "out", AggregateOptions(jobs=1))
    aggregate(paths, tmp_path / "copied", AggregateOptions(jobs=1, allow_copies=True))

    perturbed = write_all(ATTACKS["sign flip by 6 sybils"](first.scene), tmp_path / "six", "sybil")
    report = aggregate(
        [first.place / "honest", perturbed], tmp_path / "out", AggregateOptions(jobs=1)
    )
    assert len(report.clients) == len(RANKS) + 6


def test_inflated_counts_pass_up_to_the_ratio(first: Round, tmp_path: Path) -> None:
    inflated = ATTACKS["sign flip, 90 × the samples"](first.scene)
    more = [replace(one, samples=2 * one.samples) for one in inflated]
    for name, uploads, ratio in (("ninety", inflated, 10.0), ("more", more, 100.0)):
        paths = [first.place / "honest", write_all(uploads, tmp_path / name, "upload")]
        with pytest.raises(InputError, match="upload-0"):
            aggregate(paths, tmp_path / "out", AggregateOptions(jobs=1, max_count_ratio=ratio))


# --- the measurement ------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    moved: dict[str, dict[str, list[float]]] = {
        a: {d: [] for d in DEFENCES} for a in (MORE, *ATTACKS)
    }
    costs: dict[str, list[float]] = {defence: [] for defence in DEFENCES}
    trust: dict[str, list[dict[str, float]]] = {"Multi-Krum": [], "geometric median": []}
    for seed in range(ROUNDS):
        with tempfile.TemporaryDirectory() as place:
            one = make_round(Path(place), seed)
            for defence, options in DEFENCES.items():
                costs[defence].append(cost(one, options))
                for attack, row in moved.items():
                    row[defence].append(movement(one, attack, options))
            for rule, rows in trust.items():
                rows.append(trust_by_rank(one, DEFENCES[rule]))
    return {
        "rounds": ROUNDS,
        "movement": {a: {d: _cell(one) for d, one in row.items()} for a, row in moved.items()},
        "cost": {defence: _cell(one) for defence, one in costs.items()},
        "trust": {
            rule: {rank: _rounded(float(np.mean([one[rank] for one in rows]))) for rank in rows[0]}
            for rule, rows in trust.items()
        },
    }


def _cell(values: list[float]) -> dict[str, float]:
    """The first round, which the tests repeat, and the worst of all."""
    return {"first": _rounded(values[0]), "worst": _rounded(max(values))}


def _rounded(value: float) -> float:
    """Below that is rounding, and another on every machine."""
    return 0.0 if value < 1e-9 else float(f"{value:.5g}")


if __name__ == "__main__":
    PLACE.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n")
