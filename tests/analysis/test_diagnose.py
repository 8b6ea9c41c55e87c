"""Adapters and clients, diagnosed against dense float64 matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import PREFIX, Made, Spec, make, truncated
from support.rounds import ROUND, make_round

from fedlora_cli import InputError, aggregate
from fedlora_cli.analysis.diagnosis.cohort import robust_z
from fedlora_cli.analysis.diagnosis.diagnose import diagnose
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.reports.diagnose import DiagnoseReport


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
            for j, basis in enumerate(bases):
                for k, other in enumerate(bases):
                    shared = np.linalg.norm(basis.T @ other) ** 2
                    overlap[j, k] += shared / min(basis.shape[1], other.shape[1])
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
    assert any("c holds rank index 5-8 alone" in warning for warning in report.warnings)


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
    assert "turned has nearly the same update as c0" in text
    assert "the update of huge has norm" in text
    assert "the update of empty is zero" in text
    assert text.count("robust z") == 1


def test_a_robust_z_is_in_units_of_the_median_deviation() -> None:
    z = robust_z(np.exp([0.0, 1.0, 2.0, 3.0, 10.0]))

    np.testing.assert_allclose(z, np.array([-2, -1, 0, 1, 8]) / 1.4826)
    # Norms within a tenth of each other are alike, however close the rest is.
    np.testing.assert_allclose(robust_z(np.array([1, 1, 1, 1, 1.1])), [0] * 4 + [np.log(1.1) / 0.1])
    assert np.isnan(robust_z(np.zeros(3))).all()


def test_every_tensor_is_read_once(tmp_path: Path, reads: list[tuple[Path, str]]) -> None:
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global-1")
    aggregate([tmp_path / "round"], tmp_path / "global-2")
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


def test_adapters_that_may_be_rounds_of_another_tool_are_pointed_out(tmp_path: Path) -> None:
    for t in (1, 2):
        make(tmp_path / "run", Spec(f"checkpoint-{t}", 4, samples=None, seed=t))

    taken = diagnose(tmp_path / "run")
    asked = diagnose(tmp_path / "run", DiagnoseOptions(subject="clients"))

    assert any("the adapters are read as clients" in warning for warning in taken.warnings)
    assert not any("--as rounds" in warning for warning in asked.warnings)
    told = diagnose(tmp_path / "run", DiagnoseOptions(subject="rounds"))
    assert (
        told.reason
        == "the shared rank is unknown; give --shared-rank, the smallest rank of the clients"
    )


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
