"""The diagnosis against dense float64 matrices, and its verdicts on rounds of known course."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import PREFIX, Made, Spec, make, truncated
from rounds import ROUND, make_round
from safetensors.torch import load_file, save_file

from fedlora_cli import InputError, Options, UsageError, aggregate
from fedlora_cli.analysis.diagnosis.cohort import robust_z
from fedlora_cli.analysis.diagnosis.diagnose import diagnose
from fedlora_cli.analysis.diagnosis.judgement import Judgement, judge_series
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.remarks import series_remarks
from fedlora_cli.analysis.diagnosis.trend import clients_beyond, energy_factors_by_round, fit
from fedlora_cli.analysis.diagnosis.verdict import judge, kept
from fedlora_cli.files.safetensors import Entry
from fedlora_cli.provenance import Contributor, Provenance
from fedlora_cli.render.report.diagnose import AdapterRow, DiagnoseReport

SAMPLES = Path(__file__).parents[1] / "samples"


def dense_spectra(made: Made) -> dict[str, np.ndarray]:
    return {
        name: np.linalg.svd(made.update(name), compute_uv=False)[: B.shape[1]]
        for name, (B, _, _) in made.factors.items()
    }


def pooled(spectra: dict[str, np.ndarray]) -> np.ndarray:
    total = np.zeros(max(map(len, spectra.values())))
    for s in spectra.values():
        total[: len(s)] += s**2
    return total


@pytest.mark.parametrize("spec", ROUND, ids=lambda spec: spec.name)
def test_spectra_and_what_follows_equal_the_dense_ones(tmp_path: Path, spec: Spec) -> None:
    made = make(tmp_path, Spec(**{**vars(spec), "dtype": torch.float64}))
    dense = dense_spectra(made)

    row = diagnose([made.folder], DiagnoseOptions(shared_rank=1)).adapters[0]

    for module in row.modules:
        s = dense[module.name]
        np.testing.assert_allclose(module.singular_values, s, rtol=0, atol=1e-6 * s[0])
        assert module.energy_ratio == pytest.approx((s[:1] ** 2).sum() / (s**2).sum(), abs=1e-9)
        assert module.norm == pytest.approx(np.linalg.norm(made.update(module.name)))
        p = s / s.sum()
        assert module.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
        assert module.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2)
        cumulative = np.cumsum(s**2) / (s**2).sum()
        for found, share in ((module.rank_90, 0.9), (module.rank_95, 0.95), (module.rank_99, 0.99)):
            assert cumulative[found - 1] >= share - 1e-12
            assert found == 1 or cumulative[found - 2] < share
    energy = pooled(dense)
    np.testing.assert_allclose(row.energy, energy, rtol=1e-9)
    assert row.energy_ratio == pytest.approx(energy[:1].sum() / energy.sum(), abs=1e-9)
    assert row.norm == pytest.approx(energy.sum() ** 0.5)
    assert sum(one.energy for one in row.partitions) == pytest.approx(1)


def test_directions_without_energy_are_dead(tmp_path: Path) -> None:
    made = make(tmp_path, Spec("a", rank=4, shapes={"m": (9, 7)}))
    path = made.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{PREFIX}m.lora_B.weight"][:, 1] = 0
    tensors[f"{PREFIX}m.lora_B.weight"][:, 2] *= 1e-5
    save_file(tensors, path)

    row = diagnose([made.folder]).adapters[0]

    assert (row.dead, row.directions, row.modules[0].dead) == (2, 4, 2)
    assert row.energy_ratio is None  # nothing tells a shared rank


def test_an_adapter_without_any_update_has_no_ratio_and_no_nan(tmp_path: Path) -> None:
    made = make(tmp_path, Spec("a", rank=4))
    path = made.folder / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(path).items()}, path)

    report = diagnose([made.folder], DiagnoseOptions(shared_rank=2))

    row = report.adapters[0]
    assert (row.energy_ratio, row.norm, row.effective_rank, row.dead) == (None, 0, 0, 8)
    assert report.verdict is None


def test_clients_are_compared_as_dense_updates_would_be(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    vectors = [np.concatenate([one.update(m).ravel() for m in one.factors]) for one in made]
    norms = [np.linalg.norm(v) for v in vectors]

    report = diagnose([tmp_path / "round"])

    assert report.subject == "clients"
    found = report.cohort
    assert found is not None
    assert found.similarity is not None
    unit = np.array([vector / np.linalg.norm(vector) for vector in vectors])
    expected = unit @ unit.T
    np.testing.assert_allclose(found.similarity.cosine, expected, atol=1e-9)
    samples = np.array([one.samples for one in made])
    for k, client in enumerate(found.clients):
        others = sum(samples[j] * vectors[j] for j in range(len(made)) if j != k)
        cosine = vectors[k] @ others / norms[k] / np.linalg.norm(others)
        assert client.cosine == pytest.approx(cosine, abs=1e-9)
    for side, matrices in (("left", 0), ("right", 2)):
        overlap = np.zeros((len(made), len(made)))
        for name in made[0].factors:
            bases = []
            for one in made:
                parts = np.linalg.svd(one.update(name), full_matrices=False)
                r = one.factors[name][0].shape[1]
                bases.append(parts[0][:, :r] if matrices == 0 else parts[2][:r].T)
            for j, one in enumerate(bases):
                for k, other in enumerate(bases):
                    shared = np.linalg.norm(one.T @ other) ** 2
                    overlap[j, k] += shared / min(one.shape[1], other.shape[1])
        expected = overlap / len(made[0].factors)
        np.testing.assert_allclose(getattr(found.similarity, side), expected, atol=1e-9)


def test_the_partitions_say_who_holds_what_and_what_they_put_there(tmp_path: Path) -> None:
    shapes = {"m": (20, 30)}
    made = [make(tmp_path / "round", Spec(n, r, samples=s, shapes=shapes))
            for n, r, s in (("a", 2, 60), ("b", 4, 30), ("c", 8, 10))]  # fmt: skip
    energies = {one.folder.name: pooled(dense_spectra(one)) for one in made}

    report = diagnose([tmp_path / "round"])

    assert report.cohort is not None
    rows = report.cohort.partitions
    assert [(r.first, r.last, r.holders) for r in rows] == [(1, 2, 3), (3, 4, 2), (5, 8, 1)]
    assert [r.coverage for r in rows] == pytest.approx([1, 0.4, 0.1])
    assert [(r.max_weight, r.heaviest) for r in rows] == [
        (pytest.approx(0.6), "a"), (pytest.approx(0.75), "b"), (pytest.approx(1.0), "c"),
    ]  # fmt: skip
    share = {name: e / e.sum() for name, e in energies.items()}
    assert rows[1].energy == pytest.approx(
        (30 * share["b"][2:4].sum() + 10 * share["c"][2:4].sum()) / 40
    )
    assert report.energy_ratio == pytest.approx(
        (30 * share["b"][:2].sum() + 10 * share["c"][:2].sum()) / 40
    )
    assert any("5-8 is held by c alone" in warning for warning in report.warnings)


def test_copies_outliers_and_empty_updates_are_named(tmp_path: Path) -> None:
    root = tmp_path / "round"
    made = [make(root, Spec(f"c{k}", rank=4, seed=k)) for k in range(6)]
    turned = make(root, Spec("turned", rank=4)).folder / "adapter_model.safetensors"
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    tensors = load_file(made[0].folder / "adapter_model.safetensors")
    save_file(
        {k: v @ rotation if "lora_B" in k else rotation.T @ v for k, v in tensors.items()}, turned
    )
    for name, factor in (("huge", 100.0), ("empty", 0.0)):
        path = make(root, Spec(name, rank=4)).folder / "adapter_model.safetensors"
        save_file(
            {k: v * (factor if "lora_B" in k else 1) for k, v in load_file(path).items()}, path
        )

    report = diagnose([root])

    assert report.cohort is not None
    assert report.cohort.copies == (("c0", "turned"),)
    text = "\n".join(report.warnings)
    assert "turned has the update of c0, or nearly so" in text
    assert "the update of huge has norm" in text
    assert "empty has no update at all" in text
    assert text.count("robust z") == 1


def test_a_robust_z_is_in_units_of_the_median_deviation() -> None:
    z = robust_z(np.exp([0.0, 1.0, 2.0, 3.0, 10.0]))

    np.testing.assert_allclose(z, np.array([-2, -1, 0, 1, 8]) / 1.4826)
    # Norms within a tenth of each other are alike, however close the rest is.
    np.testing.assert_allclose(robust_z(np.array([1, 1, 1, 1, 1.1])), [0] * 4 + [np.log(1.1) / 0.1])
    assert np.isnan(robust_z(np.zeros(3))).all()


def untrained_rounds(root: Path, ranks: dict[int, int], method: str, rounds: int) -> list[Path]:
    """Aggregate, truncate the global adapter to each client's rank, aggregate again."""
    names = {f"{rank}-{k}": rank for rank, number in ranks.items() for k in range(number)}
    shapes = {"layers.0.q_proj": (24, 40), "layers.0.v_proj": (33, 20)}
    clients = root / "clients-1"
    for name, rank in names.items():
        make(clients, Spec(name, rank=rank, alpha=2 * rank, samples=10 + rank, shapes=shapes))
    folders = []
    for t in range(1, rounds + 1):
        folder = root / f"round-{t}" / "global"
        folder.parent.mkdir()
        aggregate([clients], folder, Options(method=method))
        folders.append(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        clients = root / f"clients-{t + 1}"
        for name, rank in names.items():
            made = make(clients, Spec(name, rank=rank, alpha=2 * rank, samples=10 + rank,
                                      shapes=shapes))  # fmt: skip
            cut = {k: v[:, :rank] if "lora_B" in k else v[:rank] for k, v in tensors.items()}
            save_file({k: v.contiguous() for k, v in cut.items()},
                      made.folder / "adapter_model.safetensors")  # fmt: skip
    return folders


@pytest.mark.parametrize(
    "ranks", [{8: 4, 16: 3}, {2: 5, 4: 3, 8: 2}, {4: 1, 8: 9}, {2: 4, 4: 3, 8: 2, 16: 1}], ids=str
)
def test_rounds_without_training_collapse_at_the_predicted_rate_under_flexlora_alone(
    tmp_path: Path, ranks: dict[int, int]
) -> None:
    samples = {rank: number * (10 + rank) for rank, number in ranks.items()}
    beyond = sum(n for rank, n in samples.items() if rank > min(ranks)) / sum(samples.values())
    rounds = 24 if beyond > 0.8 else 10

    untrained_rounds(tmp_path / "flexlora", ranks, "flexlora", rounds)
    untrained_rounds(tmp_path / "raflora", ranks, "raflora", rounds)
    flexlora = diagnose([tmp_path / "flexlora"])
    raflora = diagnose([tmp_path / "raflora"])

    assert flexlora.subject == raflora.subject == "rounds"
    assert flexlora.trend is not None
    assert raflora.trend is not None
    assert flexlora.trend.gamma == pytest.approx(beyond**2, rel=0.01)
    assert flexlora.trend.predicted_gamma == pytest.approx(beyond**2)
    assert flexlora.trend.r_squared == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(
        flexlora.trend.predicted_energy_ratio, flexlora.trend.energy_ratio, atol=1e-6
    )
    assert flexlora.verdict == "collapsed"
    assert raflora.trend.gamma == pytest.approx(1, abs=1e-3)
    assert raflora.trend.gamma >= 0.999
    assert raflora.verdict == "healthy"


def test_a_collapse_is_seen_coming(tmp_path: Path) -> None:
    folders = untrained_rounds(tmp_path, {4: 2, 8: 3}, "flexlora", 14)

    verdicts = [diagnose(folders[:t]).verdict for t in range(1, 15)]

    order = ["at risk", "collapsing", "collapsed"]
    assert verdicts[0] == "at risk"  # by the weights alone, before any energy is lost
    assert set(verdicts) == set(order)
    assert verdicts == sorted(verdicts, key=order.index)


def concentrated(root: Path, name: str, rank: int, tail: float, samples: float) -> Path:
    """A client whose energy lies in its first two directions but for a share of about tail²."""
    made = make(root, Spec(name, rank=rank, alpha=rank, samples=samples, shapes={"m": (30, 40)}))
    U, _, Vh = np.linalg.svd(np.random.default_rng(7).standard_normal((30, 40)))
    s = np.where(np.arange(rank) < 2, 1.0, tail)
    save_file(
        {
            f"{PREFIX}m.lora_B.weight": torch.from_numpy(U[:, :rank] * s),
            f"{PREFIX}m.lora_A.weight": torch.from_numpy(Vh[:rank].copy()),
        },
        made.folder / "adapter_model.safetensors",
    )
    return made.folder


def test_clients_that_concentrate_by_themselves_are_no_collapse(tmp_path: Path) -> None:
    """ρ climbs to 0.999999 here, and nothing that these clients put there was lost."""
    rounds = {"raflora": [], "flexlora": []}
    for t in range(1, 9):
        clients = tmp_path / f"clients-{t}"
        for name, rank, samples in (("a", 2, 50), ("b", 6, 10), ("c", 6, 10)):
            concentrated(clients, name, rank, tail=0.5**t, samples=samples)
        for method, folders in rounds.items():
            folders.append(tmp_path / f"{method}-{t}")
            aggregate([clients], folders[-1], Options(method=method, dtype="float64"))

    kept = diagnose(rounds["raflora"])
    lost = diagnose(rounds["flexlora"])

    assert kept.energy_ratio > 0.9999
    assert kept.trend.gamma == pytest.approx(0.25, rel=0.01)
    assert kept.trend.kept[-1] == pytest.approx(1, abs=1e-6)
    assert kept.verdict == "healthy"
    assert lost.verdict == "collapsed"


def test_real_rounds_of_the_samples(tmp_path: Path) -> None:
    """Trained adapters: what the figures show and what the verdict says must be one thing."""
    flexlora, raflora = (diagnose([SAMPLES / "rounds" / m]) for m in ("flexlora", "raflora"))

    assert flexlora.verdict == "collapsed"
    assert flexlora.trend.energy_ratio == tuple(sorted(flexlora.trend.energy_ratio))
    assert flexlora.energy_ratio > 0.99
    assert raflora.verdict == "healthy"
    assert raflora.energy_ratio < 0.8
    assert raflora.trend.predicted_gamma == 1.0
    first = diagnose([SAMPLES / "rounds/flexlora/round-01"])
    assert (first.subject, first.verdict) == ("adapter", "at risk")


def test_a_round_in_which_nobody_holds_the_higher_ranks(tmp_path: Path) -> None:
    """With the previous adapter raFLoRA keeps them; FlexLoRA forgets them in one round."""
    reports = {}
    for method in ("raflora", "flexlora"):
        (first,) = untrained_rounds(tmp_path / method, {2: 1, 6: 1}, method, 1)
        low, second = tmp_path / method / "clients-2/2-0", tmp_path / f"{method}-2"
        aggregate([low], second, Options(method=method, previous=first))
        reports[method] = diagnose([first, second])

    assert reports["raflora"].verdict == "healthy"
    before, after = reports["raflora"].trend.kept
    assert after == pytest.approx(before, abs=1e-6)
    assert reports["flexlora"].verdict == "collapsed"
    assert reports["flexlora"].energy_ratio == pytest.approx(1)
    assert reports["flexlora"].trend.predicted_gamma == 0


def test_rounds_of_other_tools_are_compared_with_the_first(tmp_path: Path) -> None:
    folders = [concentrated(tmp_path, f"round-{t}", 6, tail=0.2**t, samples=1) for t in (2, 1, 10)]
    for folder in folders:
        (folder / "fedlora.json").unlink()

    report = diagnose([tmp_path], DiagnoseOptions(subject="rounds", shared_rank=2))
    alone = diagnose([folders[0]], DiagnoseOptions(shared_rank=2))

    assert [row.name for row in report.adapters] == ["round-1", "round-2", "round-10"]
    assert report.verdict == "collapsed"
    assert "compared with the first round" in report.reason
    assert alone.verdict is None
    assert diagnose([tmp_path]).subject == "clients"


def test_what_they_are_is_told_by_the_files(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", 2, samples=3))
    make(tmp_path / "round", Spec("b", 4, samples=4))
    for t in (1, 2, 10):
        (tmp_path / "run" / f"round-{t}").mkdir(parents=True)
        aggregate([tmp_path / "round"], tmp_path / "run" / f"round-{t}" / "global")

    series = diagnose([tmp_path / "run"])
    given = diagnose([tmp_path / "run" / f"round-{t}" / "global" for t in (1, 10, 2)])

    assert series.trend is not None
    assert series.trend.names == ("round-1", "round-2", "round-10")
    assert any("in the order given: round-1, round-10, round-2" in w for w in given.warnings)
    with pytest.raises(UsageError, match=r"1 of 3 adapters, such as .*/global, are global ones"):
        diagnose([tmp_path / "round", tmp_path / "run/round-1/global"])
    with pytest.raises(InputError, match="no such file or directory"):
        diagnose([tmp_path / "nothing"])


def test_rounds_of_two_models_are_refused(tmp_path: Path) -> None:
    for name, shape in (("a", (9, 5)), ("b", (9, 6))):
        make(tmp_path / name, Spec("client", 2, shapes={"m": shape}))
        aggregate([tmp_path / name], tmp_path / f"global-{name}")

    with pytest.raises(InputError, match=r"m is 9 x 6, but 9 x 5 in .*global-a"):
        diagnose([tmp_path / "global-a", tmp_path / "global-b"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("clients", []), ("clients", "all"), ("clients", [1]), ("shared_rank", -1),
     ("shared_rank", True), ("method", None), ("options", [])],
)  # fmt: skip
def test_a_damaged_report_is_one_clear_error(tmp_path: Path, field: str, value: object) -> None:
    make(tmp_path / "round", Spec("a", 2, samples=3))
    aggregate([tmp_path / "round"], tmp_path / "global")
    path = tmp_path / "global/fedlora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    with pytest.raises(InputError, match=r"fedlora\.json: (a client|\w+) is .*; take the file"):
        diagnose([tmp_path / "global"])


def test_every_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global-1")
    aggregate([tmp_path / "round"], tmp_path / "global-2")
    reads: list[tuple[Path, str]] = []
    original = Entry.read
    monkeypatch.setattr(
        Entry,
        "read",
        lambda self, *given: (reads.append((self.path, self.key)), original(self, *given))[1],
    )

    for paths, adapters in (
        ([tmp_path / "round"], 4),
        ([tmp_path / f"global-{t}" for t in (1, 2)], 2),
    ):
        reads.clear()
        diagnose(paths)
        assert len(reads) == len(set(reads)) == adapters * 3 * 2


def test_many_clients_are_compared_only_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_round(tmp_path)
    monkeypatch.setattr("fedlora_cli.analysis.diagnosis.round.MOST_COMPARED", 3)

    quick = diagnose([tmp_path / "round"])
    asked = diagnose([tmp_path / "round"], DiagnoseOptions(similarity=True))

    assert quick.cohort.similarity is None
    assert any("--similarity" in warning for warning in quick.warnings)
    assert asked.cohort.similarity is not None
    for one, other in zip(quick.adapters, asked.adapters, strict=True):
        np.testing.assert_allclose(one.energy, other.energy, rtol=1e-9)


def test_clients_of_different_modules_are_compared_on_what_they_share(tmp_path: Path) -> None:
    shapes = {"m": (12, 20), "n": (7, 20)}
    made = [
        make(tmp_path / "round", Spec("a", 3, shapes=shapes)),
        make(tmp_path / "round", Spec("b", 3, shapes={"m": (12, 20)}, seed=5)),
        make(tmp_path / "round", Spec("c", 2, shapes={"n": (7, 20)})),
    ]

    report: DiagnoseReport = diagnose([tmp_path / "round"])

    a, b = made[0], made[1]
    whole = np.sqrt(sum(np.linalg.norm(a.update(m)) ** 2 for m in shapes))
    expected = (a.update("m") * b.update("m")).sum() / whole / np.linalg.norm(b.update("m"))
    similarity = report.cohort.similarity
    assert similarity.cosine[0][1] == pytest.approx(expected, abs=1e-9)
    assert (similarity.cosine[1][2], similarity.left[1][2]) == (0, None)
    assert truncated(a.update("m"), 3) == pytest.approx(a.update("m"))


def test_a_shared_rank_with_nothing_beyond_it_is_no_verdict() -> None:
    for rank in (16, 99):
        with pytest.raises(UsageError, match=f"{rank}, where no adapter has more than rank 16"):
            diagnose(SAMPLES / "rounds/flexlora", DiagnoseOptions(shared_rank=rank))


def test_clients_of_one_rank_cannot_collapse(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / "round", Spec(name, 4))
    for t in (1, 2):
        aggregate(tmp_path / "round", tmp_path / f"global-{t}", Options(method="flexlora"))

    report = diagnose([tmp_path / "global-1", tmp_path / "global-2"])

    assert report.verdict == "healthy"
    assert "nothing lies beyond it" in report.reason


@pytest.mark.parametrize(
    ("left", "predicted", "verdict", "course"),
    [
        ([0.05], 0.3, "at risk", ""),  # one round is no trend
        ([0.05, 0.2], 0.3, "at risk", "recovering"),
        ([0.05, 0.08], 0.3, "at risk", "recovering"),
        ([0.05, 0.052], 0.3, "collapsed", ""),
        ([0.05, 0.052], None, "collapsed", ""),
        ([0.05, 0.052], 1.0, "at risk", "steadily"),  # not the weights
        ([0.3, 0.05], 1.0, "collapsed", ""),
        ([0.1, 0.1], 0.3, "collapsed", ""),  # one tenth is not more than a tenth
        ([0.9, 0.7, 0.5], 1.0, "collapsing", ""),
        ([0.165, 0.19, 0.19, 0.176, 0.163, 0.154], 1.0, "at risk", "steadily"),
        ([0.165, 0.19, 0.19, 0.176, 0.163, 0.154], 0.3, "collapsing", ""),
        ([0.5, 0.2, 0.19], 1.0, "collapsing", ""),
        ([0.9, 0.88, 0.86], 1.0, "healthy", ""),
        ([0.9, 0.88, 0.86], 0.9, "healthy", ""),
        ([0.9, 0.88, 0.86], 0.89, "at risk", "multiply it by 0.89"),
        ([0.6, 0.55, 0.5], 1.0, "at risk", "steadily"),
        # Up and down is no recovery: what counts is where it goes.
        ([0.02, 0.0, 0.02, 0.0, 0.02], 0.3, "collapsed", ""),
        ([1, 0.4, 0.6, 0.2, 0.3, 0.1, 0.16, 0.06, 0.08], 0.3, "collapsed", ""),
        ([0.0017, 0.0017, 0.0017, None, 0.0017], 0.3, "collapsed", ""),
        ([0.9, None, 0.05], 0.3, "collapsed", ""),
    ],
)
def test_the_verdict_looks_at_direction(
    left: list[float | None], predicted: float | None, verdict: str, course: str
) -> None:
    found, reason = judge(left, fit(left)[1], predicted, beyond=2)

    assert found == verdict
    assert course in reason
    assert ("recovering" in reason) == (course == "recovering")


def test_a_residual_federation_that_recovers_is_never_called_collapsed(tmp_path: Path) -> None:
    """Its first round has no previous adapter, and is FlexLoRA's."""
    make(tmp_path / "first", Spec("low", 2, samples=97))
    make(tmp_path / "first", Spec("high", 6, samples=3))
    folders = [tmp_path / "global-1"]
    aggregate(tmp_path / "first", folders[0], Options(method="residual"))
    for t in range(2, 5):
        # The high-rank client brings more and more; what it brings is kept.
        clients = tmp_path / f"clients-{t}"
        make(clients, Spec("high", 6, samples=100 * 4**t))
        make(clients, Spec("low", 2, samples=97))
        folders.append(tmp_path / f"global-{t}")
        aggregate(clients, folders[-1], Options(method="residual", previous=folders[-2]))

    assert {diagnose(folders[:t]).verdict for t in range(1, 5)} <= {"healthy", "at risk"}


def test_two_federations_in_one_series_are_noticed() -> None:
    both = diagnose([SAMPLES / "rounds/flexlora", SAMPLES / "rounds/raflora"])

    text = "\n".join(both.warnings)
    assert "two rounds are named round-01" in text
    assert "from round-01 on the method is raflora, flexlora before" in text
    assert not diagnose(SAMPLES / "rounds/flexlora").warnings


def test_adapters_that_may_be_rounds_of_another_tool_are_pointed_out(tmp_path: Path) -> None:
    for t in (1, 2):
        make(tmp_path / "run", Spec(f"checkpoint-{t}", 4, samples=None, seed=t))

    taken = diagnose(tmp_path / "run")
    asked = diagnose(tmp_path / "run", DiagnoseOptions(subject="clients"))

    assert any("if these are rounds: --as rounds" in warning for warning in taken.warnings)
    assert not any("--as rounds" in warning for warning in asked.warnings)
    told = diagnose(tmp_path / "run", DiagnoseOptions(subject="rounds"))
    assert told.reason == "give --shared-rank, the smallest rank of the clients"


def test_momentum_is_not_predicted_by_weights(tmp_path: Path) -> None:
    folders = untrained_rounds(tmp_path / "run", {2: 1, 4: 1}, "flexlora", 2)
    third = tmp_path / "third"
    options = Options("flexlora", previous=folders[1], before_previous=folders[0], momentum=0.5)
    aggregate(tmp_path / "run/clients-3", third, options)

    report = diagnose([*folders, third])

    assert report.trend.predicted_energy_ratio[2] is None


def test_a_report_that_claims_enormous_ranks_costs_nothing(tmp_path: Path) -> None:
    folder = untrained_rounds(tmp_path, {2: 1, 4: 1}, "flexlora", 1)[0]
    path = folder / "fedlora.json"
    document = json.loads(path.read_text())
    for client in document["clients"]:
        client["rank"] = 2**24
    path.write_text(json.dumps(document))

    assert diagnose(folder).adapters[0].partitions[-1].last == 4
    document["clients"][0]["rank"] = 10**30
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="rank is 1000"):
        diagnose(folder)


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


def test_rounds_with_different_shared_ranks_take_the_smallest(tmp_path: Path) -> None:
    for t, ranks in ((1, (3, 6)), (2, (2, 6))):
        for rank in ranks:
            make(tmp_path / f"clients-{t}", Spec(f"c{rank}", rank))
        aggregate(tmp_path / f"clients-{t}", tmp_path / f"global-{t}")

    assert diagnose([tmp_path / "global-1", tmp_path / "global-2"]).shared_rank == 2


def test_gaps_and_what_is_left_out_of_a_folder_of_rounds_are_said(tmp_path: Path) -> None:
    make(tmp_path / "clients", Spec("a", 2))
    make(tmp_path / "clients", Spec("b", 4))
    for t in (1, 2, 5):
        (tmp_path / "run" / f"round-{t}").mkdir(parents=True)
        aggregate(tmp_path / "clients", tmp_path / "run" / f"round-{t}" / "global")
    (tmp_path / "run/round-6").mkdir()

    text = "\n".join(diagnose(tmp_path / "run").warnings)

    assert "gaps between these rounds" in text
    assert "round-6 left out: no global in it" in text


def test_a_client_that_outweighs_the_others_is_named(tmp_path: Path) -> None:
    for name, rank, alpha in (("low", 2, 800), ("b", 8, 8), ("c", 8, 8)):
        make(tmp_path / "clients", Spec(name, rank, alpha=alpha))
    aggregate(tmp_path / "clients", tmp_path / "global")

    report = diagnose(tmp_path / "global")

    assert any("the update of low was far larger" in warning for warning in report.warnings)


def test_updates_larger_than_any_number_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "round", Spec("a", 2, dtype=torch.float64))
    path = made.folder / "adapter_model.safetensors"
    for size in (1e80, 1e200):
        save_file({k: v / v.abs().max() * size for k, v in load_file(path).items()}, path)
        for paths in (made.folder, tmp_path / "round"):
            for subject in (None, "clients"):
                with pytest.raises(InputError, match="larger than any number"):
                    diagnose(paths, DiagnoseOptions(subject=subject))


def test_clients_of_one_direction_and_one_size_are_no_copies(tmp_path: Path) -> None:
    """As clipping leaves them: one singular value each, the same for all."""
    for k in range(3):
        path = make(tmp_path / "round", Spec(f"c{k}", 1, seed=k, shapes={"m": (30, 40)})).folder
        path = path / "adapter_model.safetensors"
        save_file({key: v / v.norm() for key, v in load_file(path).items()}, path)
    scaled = make(tmp_path / "round", Spec("scaled", 1, shapes={"m": (30, 40)})).folder
    first = load_file(tmp_path / "round/c0/adapter_model.safetensors")
    save_file({k: v * 1.001 for k, v in first.items()}, scaled / "adapter_model.safetensors")

    assert diagnose(tmp_path / "round").cohort.copies == (("c0", "scaled"),)
    # Without cosines, singular values are all there is.
    by_values = diagnose(tmp_path / "round", DiagnoseOptions(similarity=False)).cohort.copies
    assert ("c0", "c1") in by_values


def test_overlap_is_with_the_others_alone(tmp_path: Path) -> None:
    make_round(tmp_path)

    found = diagnose(tmp_path / "round").cohort

    both = (np.array(found.similarity.left) + np.array(found.similarity.right)) / 2
    for k, client in enumerate(found.clients):
        others = [both[k, j] for j in range(len(both)) if j != k]
        assert client.overlap == pytest.approx(np.mean(others))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 10**9), ("rank", 10**400), ("samples", 10**400), ("samples", 1e300),
     ("energy", [10**400]), ("energy", [1e300]), ("energy", [1.0] * 9)],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, field: str, value: object) -> None:
    make(tmp_path / "round", Spec("a", 2, samples=3))
    aggregate(tmp_path / "round", tmp_path / "global")
    path = tmp_path / "global/fedlora.json"
    document = json.loads(path.read_text())
    document["clients"][0][field] = value
    path.write_text(json.dumps(document))

    with pytest.raises(InputError, match=r"fedlora\.json"):
        diagnose(tmp_path / "global")


def test_a_cut_output_is_a_loss_and_the_cut_is_named(tmp_path: Path) -> None:
    folders = []
    for t in (1, 2, 3):
        for rank in (2, 8):
            make(tmp_path / f"clients-{t}", Spec(f"c{rank}", rank, seed=t))
        folders.append(tmp_path / f"global-{t}")
        aggregate(tmp_path / f"clients-{t}", folders[-1], Options(rank=2))

    report = diagnose(folders)

    assert report.verdict == "collapsed"
    assert "the output was cut to rank 2, below the clients' 8" in report.reason


def test_beyond_what_any_client_held_nothing_can_be_lost(tmp_path: Path) -> None:
    """FLoRA's rank is the sum of the clients': what lies beyond theirs is a mixture."""
    for t in (1, 2, 3):
        for name in ("a", "b"):
            # The two grow alike.
            seed = t if name == "a" else (t if t == 3 else 10 + t)
            made = make(tmp_path / f"clients-{t}", Spec(name, 4, seed=seed))
            if t == 3 and name == "b":
                first = load_file(tmp_path / "clients-3/a/adapter_model.safetensors")
                first = {k: v * (0.999 if "lora_B" in k else 1) for k, v in first.items()}
                save_file(first, made.folder / "adapter_model.safetensors")
        aggregate(tmp_path / f"clients-{t}", tmp_path / f"global-{t}", Options(method="flora"))

    report = diagnose([tmp_path / f"global-{t}" for t in (1, 2, 3)])

    assert report.verdict == "healthy"
    assert "nothing lies beyond it" in report.reason


def test_of_verdicts_as_bad_the_lowest_rank_is_shown() -> None:
    own = [[1.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    origin = told([1, 2, 4], [8, 1, 1], own)
    fading = [[1.0, 0.1**t, 0.1**t, 0.1**t] for t in range(1, 5)]

    found = judged(fading, [origin] * 4, rank=1)

    assert (found.verdict, found.course.rank) == ("collapsed", 1)
    # Not below the shared rank that was asked for.
    assert judged(fading, [origin] * 4, rank=2).course.rank == 2


def test_ranks_that_differ_by_module_are_not_predicted(tmp_path: Path) -> None:
    shapes = {"q": (9, 8), "v": (7, 8)}
    for name, q, v in (("a", 6, 2), ("b", 2, 6)):
        make(tmp_path / "clients", Spec(name, 2, shapes=shapes, ranks={"q": q, "v": v}))
    aggregate(tmp_path / "clients", tmp_path / "global", Options(method="flexlora"))

    report = diagnose([tmp_path / "global"], DiagnoseOptions(subject="rounds"))

    assert report.trend.predicted_gamma is None


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

    assert any("gaps" in remark for remark in remarks) == gaps


def test_hetlora_is_predicted_by_the_norms_of_the_clients() -> None:
    """Norms 3 and 1: the second client has a quarter of the weight, in both factors."""
    origin = told([1, 2], [1, 1], [[9.0], [0.5, 0.5]], method="hetlora")

    found = judged([[1.0, 1.0]] * 2, [origin] * 2, rank=1)

    assert found.course.predicted_gamma == pytest.approx(0.25**4)
