"""All methods side by side against dense float64 matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import oracle
from support.adapters import PREFIX, Made, Spec, make, truncated
from support.rounds import SHAPES, make_round

from fedlora_cli import METHODS, AggregateOptions, InputError, aggregate
from fedlora_cli.analysis.comparison.compare import compare
from fedlora_cli.reports.compare import CompareReport


def dense(
    made: list[Made], method: str, rank: int, previous: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """What a method would write, module by module."""
    result = {}
    for name in made[0].factors:
        given = [(*one.factors[name], one.samples) for one in made]
        update = oracle.aggregate(method, given, None if previous is None else previous[name])
        compress = METHODS[method].compress == "svd"
        result[name] = truncated(update, rank) if compress else update
    return result


def flat(updates: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([updates[name].ravel() for name in sorted(updates)])


def check(
    report: CompareReport, updates: dict[str, dict[str, np.ndarray]], mean: np.ndarray
) -> None:
    rows = {row.name: (m, row) for m, row in enumerate(report.methods)}
    vectors = {name: flat(update) for name, update in updates.items()}
    size = np.linalg.norm(mean)
    assert report.mean_norm == pytest.approx(size, rel=1e-9)
    for name, vector in vectors.items():
        m, row = rows[name]
        assert row.refused is None
        assert row.norm == pytest.approx(np.linalg.norm(vector), rel=1e-8)
        assert row.distance == pytest.approx(np.linalg.norm(vector - mean) / size, abs=1e-8)
        spectra = [np.linalg.svd(u, compute_uv=False) for u in updates[name].values()]
        inside = sum((s[: report.shared_rank] ** 2).sum() for s in spectra)
        assert row.energy_ratio == pytest.approx(inside / (row.norm**2), abs=1e-9)
        for other, third in vectors.items():
            k = rows[other][0]
            expected = np.linalg.norm(vector - third) / size
            assert report.distances[m][k] == pytest.approx(expected, abs=1e-8)


def test_every_method_is_what_the_dense_oracle_says(tmp_path: Path) -> None:
    made = make_round(tmp_path)

    report = compare([tmp_path / "round"])

    able = [name for name in METHODS if name != "ffa"]
    updates = {name: dense(made, name, rank=6) for name in able}
    mean = flat(dense(made, "flora", rank=0))
    check(report, updates, mean)
    ffa = report.methods[-1]
    assert ffa.name == "ffa"
    assert "is not the A of the other clients" in ffa.refused
    assert set(report.distances[-1]) == {None}
    assert (report.ranks, report.modules, report.shared_rank) == ((2, 5, 6, 4), len(SHAPES), 2)


def test_with_a_previous_adapter_and_a_quorum(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    previous = make(tmp_path, Spec("previous", rank=7, shapes=SHAPES, seed=9))

    report = compare([tmp_path / "round"], AggregateOptions(previous=previous.folder, quorum=1.0))

    before = {name: previous.update(name) for name in SHAPES}
    given = {name: dense(made, name, 7, before) for name in ("raflora", "residual")}
    plain = {name: dense(made, name, 6) for name in ("flexlora", "flora", "fedavg", "rbla")}
    updates = given | plain | {"raflora, q = 1": given["residual"]}
    check(report, updates, flat(dense(made, "flora", rank=0)))
    assert [row.name for row in report.methods][:2] == ["raflora", "raflora, q = 1"]


def test_it_agrees_with_what_aggregate_writes(tmp_path: Path) -> None:
    make_round(tmp_path)

    report = compare([tmp_path / "round"], AggregateOptions(rank=3))

    for row in report.methods:
        if row.refused is None:
            out = tmp_path / row.name
            written = aggregate(
                [tmp_path / "round"], out, AggregateOptions(method=row.name, rank=3)
            )
            assert row.energy_ratio == pytest.approx(written.energy_ratio, abs=1e-12)
            assert row.kept_energy == pytest.approx(written.kept_energy, abs=1e-12)
    refused = {row.name for row in report.methods if row.refused}
    assert refused == {"flora", "fedavg", "hetlora", "rbla", "ffa"}


def test_stacks_wider_than_the_module(tmp_path: Path) -> None:
    """Then the module's own matrix is the core."""
    shapes = {"m": (6, 9)}
    made = [make(tmp_path / "round", Spec(f"c{k}", 3, seed=k, shapes=shapes)) for k in range(4)]

    report = compare([tmp_path / "round"])

    able = [name for name in METHODS if name != "ffa"]
    updates = {name: dense(made, name, rank=3) for name in able}
    check(report, updates, flat(dense(made, "flora", rank=0)))


def test_ffa_runs_where_all_share_one_A(tmp_path: Path) -> None:
    made = make_round(tmp_path, [Spec("a", 2), Spec("b", 5)])
    shared = load_file(made[1].folder / "adapter_model.safetensors")
    path = made[0].folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if "lora_A" in key:
            tensors[key] = shared[key][:2].clone()
    save_file(tensors, path)
    for name, (B, _, scale) in made[0].factors.items():
        made[0].factors[name] = (B, made[1].factors[name][1][:2], scale)

    report = compare([tmp_path / "round"])

    mean = flat(dense(made, "flora", rank=0))
    check(report, {"ffa": dense(made, "ffa", 0), "flora": dense(made, "flora", 0)}, mean)
    assert report.methods[-1].distance == pytest.approx(0, abs=1e-7)


def test_nothing_is_written_and_every_tensor_is_read_once(
    tmp_path: Path, reads: list[tuple[Path, str]]
) -> None:
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "previous")
    before = sorted(tmp_path.rglob("*"))
    reads.clear()

    compare([tmp_path / "round"], AggregateOptions(previous=tmp_path / "previous"))

    assert sorted(tmp_path.rglob("*")) == before
    assert len(reads) == len(set(reads)) == 5 * len(SHAPES) * 2


def test_a_module_that_only_the_previous_adapter_has(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", 2, shapes={"m": (9, 7)}))
    before = make(tmp_path, Spec("before", 2, shapes={"m": (9, 7), "n": (5, 6)}))

    report = compare([tmp_path / "round"], AggregateOptions(previous=before.folder))

    rows = {row.name: row for row in report.methods}
    alone = np.linalg.norm(before.update("n"))
    assert rows["raflora"].norm ** 2 - rows["flexlora"].norm ** 2 == pytest.approx(alone**2)


def test_clients_without_any_update_have_no_ratios(tmp_path: Path) -> None:
    folder = make(tmp_path / "round", Spec("a", 2)).folder
    path = folder / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(path).items()}, path)

    row = compare([tmp_path / "round"]).methods[0]

    assert (row.norm, row.energy_ratio, row.kept_energy, row.distance) == (0, None, None, None)


def test_what_ails_the_clients_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "round", Spec("a", 2)).folder
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{PREFIX}layers.0.q_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, path)

    with pytest.raises(InputError, match="NaN"):
        compare([tmp_path / "round"])
