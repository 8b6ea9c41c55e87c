"""What bounds the influence of a client, through `aggregate` on files, against dense float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Made,
    Spec,
    make,
    relative_error,
    written_update,
)

from fedlora_cli import AggregateOptions, AggregateReport, UsageError, aggregate
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.robust.distances import compare, relative
from fedlora_cli.robust.trust import geometric_median, multi_krum

Array = npt.NDArray[np.float64]

Q, V, FC = "layers.0.q_proj", "layers.0.v_proj", "layers.1.fc"
SHAPES = {Q: (24, 40), V: (13, 40), FC: (40, 31)}
HEAD, BIAS = "score.weight", f"{Q}.lora_B.bias"

#: No output rank is smaller than a module's own, so that nothing is truncated.
WHOLE = 31


def spec(name: str, rank: int, number: int, **more: Any) -> Spec:
    shapes = more.pop("shapes", SHAPES)
    rng = torch.Generator().manual_seed(number)
    # As PEFT stores them, every module has a bias; only that of Q was trained.
    tensors = {f"{name}.lora_B.bias": torch.zeros(out) for name, (out, _) in shapes.items()}
    if Q in shapes:
        tensors[BIAS] = torch.randn(24, generator=rng)
    config: dict[str, Any] = {"lora_bias": True}
    if more.pop("head", True):
        tensors[HEAD] = torch.randn(3, 4, generator=rng)
        config["modules_to_save"] = ["score"]
    return Spec(name, rank, shapes=shapes, tensors=tensors, config=config, **more)


#: Mixed ranks, alphas, dtypes and sample counts; modules and heads that some lack; one update that
#: is large, and one that is zero samples' worth.
ROUND = [
    spec("ann", 2, 1, samples=30, alpha=4),
    spec("bob", 5, 2, samples=11, alpha=3, rslora=True),
    spec("cy", 3, 3, samples=50, alpha=7, ranks={FC: 6}, head=False),
    spec("dee", 4, 4, samples=9, alphas={Q: 32}, dtype=torch.bfloat16),
    spec("eve", 6, 5, samples=20, alpha=90),
    spec("fay", 2, 6, samples=25, shapes={Q: (24, 40), FC: (40, 31)}),
    spec("gus", 8, 7, samples=14, shapes={V: (13, 40), FC: (40, 31)}),
    spec("hal", 4, 8, samples=0),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    root = tmp_path_factory.mktemp("clients")
    return [replace(make(root / "round", one), samples=float(one.samples or 0)) for one in ROUND]


@pytest.fixture(scope="module")
def earlier(made: list[Made], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The last two global adapters, the first of them of other clients and of rank 5."""
    root = tmp_path_factory.mktemp("earlier")
    aggregate([one.folder for one in made[:2]], root / "first")
    aggregate([one.folder for one in made[2:6]], root / "second", AggregateOptions(rank=7))
    return root / "second", root / "first"


# --- the oracle -----------------------------------------------------------------------------------


def norms(made: Sequence[Made]) -> Array:
    """‖ΔW_k‖_F over all modules, and the biases on lora_B that are updates too."""
    return np.array(
        [
            np.sqrt(
                sum(np.square(one.update(m)).sum() for m in one.factors)
                + np.square(bias_update(one)).sum()
            )
            for one in made
        ]
    )


def bias_update(one: Made) -> Array:
    bias = load_file(one.folder / WEIGHTS).get(PREFIX + BIAS)
    return np.zeros(0) if bias is None else one.factors[Q][2] * bias.double().numpy()


def bias_factors(one: Made) -> Factors | None:
    """A bias as an update of one column."""
    bias = torch.from_numpy(bias_update(one))
    one_ = torch.ones(1, 1, dtype=torch.float64)
    return Factors(bias[:, None], one_) if bias.numel() else None


def expected_clip(made: Sequence[Made], limit: float | str | None) -> Array:
    if limit is None:
        return np.ones(len(made))
    top = 2 * float(np.median(norms(made))) if limit == "auto" else float(limit)
    return np.array([min(1.0, top / one) for one in norms(made)])


def factors(one: Made, module: str) -> Factors:
    B, A, scale = one.factors[module]
    return Factors(torch.from_numpy(B), torch.from_numpy(A), scale)


def expected_trust(made: Sequence[Made], options: AggregateOptions) -> Array:
    """The rule on the sum of all distances; rules and distances have tests of their own."""
    samples = np.array([one.samples for one in made])
    if options.robust is None:
        return np.ones(len(made))
    levels = sorted({A.shape[0] for one in made for _, A, _ in one.factors.values()})
    total = compare([bias_factors(one) for one in made], levels)
    for module in SHAPES:
        updates = [factors(one, module) if module in one.factors else None for one in made]
        total += compare(updates, levels)
    if options.robust == "multi-krum":
        return multi_krum(relative(total), samples, options.attackers or 0)
    return geometric_median(relative(total), samples)


def capped(weights: list[float], limit: float) -> tuple[list[float], float]:
    """What is above the limit goes to those below it, in proportion; and what is left then."""
    whole, weights = sum(weights), list(weights)
    full: set[int] = set()
    while above := {k for k, w in enumerate(weights) if w > limit * (1 + 1e-12)}:
        full |= above
        rest = sum(w for k, w in enumerate(weights) if k not in full)
        spare = whole - limit * len(full)
        for k, w in enumerate(weights):
            weights[k] = limit if k in full else w * spare / rest if rest else 0.0
    return weights, whole - sum(weights)


@dataclass(frozen=True, eq=False)
class Bounds:
    """What every client's update and samples are multiplied by."""

    clip: Array
    trust: Array


def expected_bounds(made: Sequence[Made], options: AggregateOptions) -> Bounds:
    return Bounds(expected_clip(made, options.clip_norm), expected_trust(made, options))


def expected_update(
    made: Sequence[Made],
    module: str,
    options: AggregateOptions,
    bounds: Bounds,
    previous: Array,
    previous_rank: int,
) -> Array:
    """sum_k s_k c_k B_k diag(w_k) A_k, with n_k t_k samples, one rank index at a time."""
    uses_previous = options.method in ("raflora", "residual")
    quorum = {"raflora": options.quorum or 0.0, "residual": 1.0}.get(options.method, 1.0)
    samples = [
        one.samples * t if module in one.factors or options.missing == "zero" else 0.0
        for one, t in zip(made, bounds.trust, strict=True)
    ]
    ranks = [one.factors[module][1].shape[0] if module in one.factors else 0 for one in made]
    U, sigma, Vh = np.linalg.svd(previous)
    result = np.zeros(SHAPES[module])
    for i in range(max(*ranks, previous_rank)):
        held = sum(n for n, r in zip(samples, ranks, strict=True) if r > i)
        whole = max(held, quorum * sum(samples))
        weights = [
            n / whole if r > i and whole else 0.0 for n, r in zip(samples, ranks, strict=True)
        ]
        left = 1 - held / whole if whole else 1.0
        if options.max_weight is not None:
            weights, spare = capped(weights, options.max_weight)
            left += spare
        for one, weight, c in zip(made, weights, bounds.clip, strict=True):
            if weight:
                B, A, s = one.factors[module]
                result += weight * c * s * np.outer(B[:, i], A[i])
        if uses_previous and i < previous_rank:
            result += left * sigma[i] * np.outer(U[:, i], Vh[i])
    return result


def expected_tensors(
    made: Sequence[Made], bounds: Bounds, scale: float, limit: float | None
) -> dict[str, Array]:
    """Heads by trusted samples, unclipped; biases on lora_B like the updates they belong to."""
    sums: dict[str, Any] = {HEAD: 0.0, BIAS: 0.0}
    for name in sums:
        values, samples = [], []
        for one, c, t in zip(made, bounds.clip, bounds.trust, strict=True):
            tensors = load_file(one.folder / WEIGHTS)
            if PREFIX + name in tensors and t > 0:
                factor = c * one.factors[Q][2] / scale if name == BIAS else 1.0
                values.append(factor * tensors[PREFIX + name].double().numpy())
                samples.append(one.samples * t)
        weights = [n / sum(samples) for n in samples]
        weights, spare = capped(weights, max(limit or 1.0, 1 / sum(w > 0 for w in weights)))
        assert abs(spare) < 1e-12
        sums[name] = sum(w * value for w, value in zip(weights, values, strict=True))
    return sums


def check(
    made: Sequence[Made],
    output: Path,
    options: AggregateOptions,
    earlier: tuple[Path, Path] | None = None,
) -> AggregateReport:
    """Aggregate, verify, and compare everything written and told with the oracle."""
    given = replace(
        options,
        verify=True,
        dtype="float64",
        jobs=1,
        previous=earlier[0] if earlier else None,
        before_previous=earlier[1] if earlier and options.momentum else None,
        rank=None if options.method == "flora" else WHOLE,
    )
    report = aggregate([one.folder for one in made], output, given)
    bounds = expected_bounds(made, options)
    for module, shape in SHAPES.items():
        previous, before = np.zeros(shape), np.zeros(shape)
        rank = 0
        if earlier:
            previous, before = (written_update(one, module) for one in earlier)
            rank = json.loads((earlier[0] / CONFIG).read_text())["r"]
        expected = expected_update(made, module, options, bounds, previous, rank)
        expected += options.momentum * (previous - before)
        assert relative_error(written_update(output, module), expected) < 1e-9, module
    tensors = load_file(output / WEIGHTS)
    for name, expected in expected_tensors(made, bounds, report.scale, options.max_weight).items():
        found = tensors[PREFIX + name].double().numpy()
        assert relative_error(found, expected) < 1e-6, name
    if options.clip_norm or options.robust:
        told = {"norm": norms(made), "clip": bounds.clip, "trust": bounds.trust}
        written = json.loads((output / "fedlora.json").read_text())["clients"]
        for field, values in told.items():
            assert [getattr(row, field) for row in report.clients] == pytest.approx(list(values))
            assert [row[field] for row in written] == pytest.approx(list(values))
        assert (bounds.clip.min() < 1) == (options.clip_norm is not None)
        assert (bounds.trust.min() < 1) == (options.robust is not None)
    return report


# --- the options alone, and together --------------------------------------------------------------


AUTO = AggregateOptions(clip_norm="auto")
KRUM = AggregateOptions(robust="multi-krum", attackers=2)
MEDIAN = AggregateOptions(robust="geometric-median")
ALL = AggregateOptions(
    quorum=0.5, max_weight=0.3, clip_norm="auto", robust="geometric-median", missing="zero"
)

CHOICES = {
    "nothing": AggregateOptions(),
    "max-weight": AggregateOptions(max_weight=0.2),
    "max-weight tiny": AggregateOptions(max_weight=0.05),
    "clip": AUTO,
    "clip at 30": AggregateOptions(clip_norm=30.0),
    "multi-krum": KRUM,
    "median": MEDIAN,
    "all": ALL,
    "all with multi-krum": replace(ALL, robust="multi-krum", attackers=1),
    "median, zero": replace(MEDIAN, missing="zero"),
    "quorum, zero, krum": replace(KRUM, missing="zero", quorum=0.7),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_its_formula(made: list[Made], tmp_path: Path, name: str) -> None:
    check(made, tmp_path / "out", CHOICES[name])


@pytest.mark.parametrize(
    ("name", "momentum"),
    [("max-weight", 0.0), ("multi-krum", 0.6), ("all", 0.0), ("all", 0.6), ("max-weight", 0.6)],
)
def test_with_the_global_adapters_of_earlier_rounds(
    made: list[Made], earlier: tuple[Path, Path], tmp_path: Path, name: str, momentum: float
) -> None:
    check(made, tmp_path / "out", replace(CHOICES[name], momentum=momentum), earlier)


@pytest.mark.parametrize("method", ["residual", "flexlora", "flora"])
def test_every_method_that_sums_updates(
    made: list[Made], earlier: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    options = replace(ALL, method=method, quorum=None)
    check(made, tmp_path / "out", options, earlier if method == "residual" else None)


def test_clipped_updates_and_capped_weights_in_methods_that_average_factors(
    made: list[Made], tmp_path: Path
) -> None:
    """Both factors of a client carry the root of its clip."""
    clip = expected_clip(made, "auto")
    samples = np.array([one.samples for one in made])
    options = AggregateOptions(method="fedavg", clip_norm="auto", max_weight=0.2, verify=True)
    aggregate([one.folder for one in made], tmp_path / "out", options)

    holders = [
        (one, c, n) for one, c, n in zip(made, clip, samples, strict=True) if Q in one.factors
    ]
    total = sum(n for *_, n in holders)
    B, A = np.zeros((24, 6)), np.zeros((6, 40))
    for i in range(6):
        weights = [n / total if one.factors[Q][1].shape[0] > i else 0.0 for one, _, n in holders]
        for (one, c, _), weight in zip(holders, capped(weights, 0.2)[0], strict=True):
            if weight:
                b, a, s = one.factors[Q]
                B[:, i] += weight * (c * s) ** 0.5 * b[:, i]
                A[i] += weight * (c * s) ** 0.5 * a[i]
    assert relative_error(written_update(tmp_path / "out", Q), B @ A) < 1e-6


def test_hetlora_weighs_by_the_clipped_norms(made: list[Made], tmp_path: Path) -> None:
    options = AggregateOptions(method="hetlora", clip_norm="auto", verify=True)
    report = aggregate([one.folder for one in made], tmp_path / "out", options)

    clip = expected_clip(made, "auto")
    own = [
        {m: c * np.linalg.norm(one.update(m)) for m in one.factors}
        for one, c in zip(made, clip, strict=True)
    ]
    totals = {m: sum(one.get(m, 0.0) for one in own) for m in SHAPES}
    for row, one in zip(report.clients, own, strict=True):
        assert row.weight == pytest.approx(np.mean([n / totals[m] for m, n in one.items()]))


def test_without_a_look_at_updates_there_is_nothing_to_tell(
    made: list[Made], tmp_path: Path
) -> None:
    for options in (
        AggregateOptions(max_weight=0.2),
        AggregateOptions(clip_norm="auto", dry_run=True),
    ):
        report = aggregate([one.folder for one in made], tmp_path / "out", options)
        assert {(row.clip, row.trust) for row in report.clients} == {(None, None)}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_the_norms_are_told_without_any_of_it(made: list[Made], tmp_path: Path) -> None:
    """Of the factors, whose singular values are known; one that is beyond all others is said."""
    report = aggregate([one.folder for one in made], tmp_path / "out", AggregateOptions())

    factors_only = [
        np.sqrt(sum(np.square(one.update(m)).sum() for m in one.factors)) for one in made
    ]
    found = {row.name: row.norm for row in report.clients}
    for one, norm in zip(made, factors_only, strict=True):
        assert found[one.folder.name] == pytest.approx(norm)
    far = [one.folder.name for one, n in zip(made, factors_only, strict=True) if n > 1000]
    assert len(far) == 1
    assert [w.split()[3] for w in report.warnings if "as large as the median" in w] == far


@pytest.mark.parametrize("limit", [0.05, 0.2, 0.5])
def test_no_weight_in_the_report_is_above_the_limit(
    made: list[Made], tmp_path: Path, limit: float
) -> None:
    options = AggregateOptions(max_weight=limit, robust="geometric-median")
    report = aggregate([one.folder for one in made], tmp_path / "out", options)

    top = max(row.max_weight or 0.0 for row in report.clients)
    assert top == pytest.approx(limit)
    assert top <= limit
    assert max(row.max_weight or 0.0 for row in report.partitions) == top


def test_bfloat16_clients_are_clipped_and_trusted_as_they_are_stored(
    made: list[Made], tmp_path: Path
) -> None:
    """Whole rounds in bfloat16: the output is written within its own rounding."""
    rounded = [replace(one, dtype=torch.bfloat16) for one in ROUND]
    small = [make(tmp_path / "round", one) for one in rounded]
    small = [
        replace(one, samples=float(s.samples or 0)) for one, s in zip(small, ROUND, strict=True)
    ]
    options = replace(ALL, rank=WHOLE, verify=True)
    report = aggregate([tmp_path / "round"], tmp_path / "out", options)
    bounds = expected_bounds(small, ALL)

    assert report.dtype == "bfloat16"
    for module, shape in SHAPES.items():
        expected = expected_update(small, module, ALL, bounds, np.zeros(shape), 0)
        assert relative_error(written_update(tmp_path / "out", module), expected) < 8e-3


# --- what must not matter -------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("robust", [KRUM, MEDIAN], ids=["krum", "median"])
def test_the_same_bytes_for_any_order_and_number_of_jobs(
    made: list[Made], tmp_path: Path, robust: AggregateOptions
) -> None:
    folders = [one.folder for one in made]
    options = replace(robust, clip_norm="auto", max_weight=0.3, quorum=0.5)
    results = []
    for number, (order, jobs) in enumerate(((folders, 1), (folders[::-1], 3))):
        aggregate(order, tmp_path / f"{number}", replace(options, jobs=jobs))
        results.append(contents(tmp_path / f"{number}"))

    assert results[0] == results[1]


def test_names_of_clients_do_not_matter(made: list[Made], tmp_path: Path) -> None:
    """Sums go in the order of the names: the update is the same within rounding."""
    options = replace(ALL, dtype="float64", rank=WHOLE)
    aggregate([one.folder for one in made], tmp_path / "out", options)
    for number, one in enumerate(reversed(made)):
        shutil.copytree(one.folder, tmp_path / "renamed" / f"{number}")
    aggregate([tmp_path / "renamed"], tmp_path / "other", options)

    for module in SHAPES:
        expected = written_update(tmp_path / "out", module)
        assert relative_error(written_update(tmp_path / "other", module), expected) < 1e-6


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"robust": "multi-krum"},
            "--robust multi-krum: given without --attackers; give both: Multi-Krum",
        ),
        ({"attackers": 1}, "--attackers: given without --robust multi-krum; give both"),
        ({"robust": "geometric-median", "attackers": 1}, "without --robust multi-krum"),
        ({"robust": "multi-krum", "attackers": 0}, "--attackers: 0"),
        ({"max_weight": 0.0}, r"--max-weight: 0.0"),
        ({"max_weight": 1.01}, r"--max-weight: 1.01"),
        ({"max_weight": float("nan")}, r"--max-weight: nan"),
        (
            {"clip_norm": 0.0},
            "--clip-norm: 0.0 is out of range; it must be a positive number, or auto",
        ),
        ({"clip_norm": float("inf")}, "--clip-norm: inf"),
        ({"clip_norm": float("nan")}, "--clip-norm: nan"),
    ],
)
def test_numbers_and_pairs_that_make_no_sense_are_refused(
    choices: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        AggregateOptions(**choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AggregateOptions(robust="multi-krum", attackers=3), "3 of 8 clients; .* give at most 2"),
        (
            AggregateOptions(method="fedavg", robust="geometric-median"),
            "fedavg averages factors.*raflora",
        ),
        (
            AggregateOptions(method="hetlora", robust="multi-krum", attackers=1),
            "hetlora averages factors",
        ),
        (AggregateOptions(method="rbla", robust="geometric-median"), "rbla averages factors"),
        (AggregateOptions(method="ffa", robust="geometric-median"), "ffa averages factors"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_read(
    made: list[Made], tmp_path: Path, options: AggregateOptions, message: str
) -> None:
    for dry in (False, True):
        with pytest.raises(UsageError, match=message):
            aggregate([one.folder for one in made], tmp_path / "out", replace(options, dry_run=dry))
    assert not (tmp_path / "out").exists()


# --- these tests can fail -------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A defect, as a monkeypatch, and a choice under which the oracle must see it."""

    where: object
    name: str
    wrong: Any
    choice: str


MUTATIONS = {
    "no clip": Mutation(Plan, "clipped", lambda plan, k: 1.0, "clip"),
    "clip twice": Mutation(
        Plan, "clipped", lambda plan, k: 1.0 if plan.clip is None else plan.clip[k] ** 2, "clip"
    ),
    "no trust": Mutation(Plan, "samples", property(lambda plan: plan.cohort.samples), "median"),
    "trust twice": Mutation(
        Plan,
        "samples",
        property(lambda p: p.cohort.samples * (1 if p.trust is None else p.trust**2)),
        "median",
    ),
    "no cap": Mutation(
        "fedlora_cli.aggregation.plan", "capped", lambda weights, *_: weights, "max-weight"
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_defect_is_seen(
    made: list[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    defect = MUTATIONS[name]
    if isinstance(defect.where, str):
        monkeypatch.setattr(f"{defect.where}.{defect.name}", defect.wrong)
    else:
        monkeypatch.setattr(defect.where, defect.name, defect.wrong)
    with pytest.raises(AssertionError):
        check(made, tmp_path / "out", CHOICES[defect.choice])


def test_a_head_that_only_untrusted_clients_have_is_not_written(tmp_path: Path) -> None:
    """Nor is a share of it given to anybody; with the previous adapter, that one's is kept."""
    own = {"score.weight": torch.ones(3, 4)}
    rest = {"config": {"modules_to_save": ["score"]}, "rank": 4, "alpha": 4}
    for k in range(5):
        make(tmp_path / "round", Spec(f"honest-{k}", seed=k, **rest))
    for k in range(2):
        folder = make(tmp_path / "round", Spec(f"evil-{k}", seed=k, tensors=own, **rest)).folder
        tensors = load_file(folder / WEIGHTS)
        scaled = {key: tensor * (1000 + k) for key, tensor in tensors.items()}
        save_file(scaled, folder / WEIGHTS)
    options = AggregateOptions(robust="multi-krum", attackers=2, verify=True)

    report = aggregate(tmp_path / "round", tmp_path / "out", options)

    assert [row.name for row in report.clients if row.trust == 0] == ["evil-0", "evil-1"]
    assert any("only clients that --robust leaves out have them" in w for w in report.warnings)
    assert PREFIX + "score.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    make(tmp_path, Spec("last", tensors=own, samples=None, **rest))
    aggregate(tmp_path / "round", tmp_path / "two", replace(options, previous=tmp_path / "last"))
    kept = load_file(tmp_path / "two" / WEIGHTS)[PREFIX + "score.weight"]
    assert torch.equal(kept, own["score.weight"])


def test_a_dry_run_does_not_tell_what_a_robust_rule_would_change(tmp_path: Path) -> None:
    for k in range(5):
        make(tmp_path / "round", Spec(f"client-{k}", rank=4, seed=k))
    options = AggregateOptions(robust="geometric-median", dry_run=True)

    report = aggregate(tmp_path / "round", tmp_path / "out", options)

    assert {row.weight for row in report.clients} == {None}
    assert {row.max_weight for row in report.partitions} == {None}
