"""The main job on files, exact against the dense oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import oracle
from support.adapters import Made, Spec, make, relative_error, truncated, written_update
from support.rounds import ROUND, SHAPES, expected_update, make_round

from fedlora_cli import METHODS, AggregateOptions, aggregate


def share_A(made: list[Made]) -> None:
    """Give all clients the rows of one A, as FFA-LoRA trains them."""
    rng = torch.Generator().manual_seed(7)
    pool = {
        module: torch.randn(9, columns, generator=rng) for module, (_, columns) in SHAPES.items()
    }
    for one in made:
        path = one.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for module, (B, _, scale) in one.factors.items():
            A = pool[module][: B.shape[1]].clone()
            tensors[f"base_model.model.{module}.lora_A.weight"] = A
            one.factors[module] = (B, A.double().numpy(), scale)
        save_file(tensors, path)


@pytest.mark.parametrize("method", METHODS)
def test_the_written_update_equals_the_dense_reference(tmp_path: Path, method: str) -> None:
    made = make_round(tmp_path)
    if method == "ffa":
        share_A(made)

    report = aggregate(
        [tmp_path / "round"], tmp_path / "out", AggregateOptions(method=method, verify=True)
    )

    truncates = METHODS[method].compress == "svd"
    for module in SHAPES:
        expected = expected_update(made, module, method, report.rank if truncates else None)
        # Averages with mixed scalings go through square roots; all stay at float32's rounding.
        assert relative_error(written_update(tmp_path / "out", module), expected) < 2e-7
    assert report.verification is not None
    assert report.verification.max_error < 2e-7


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
@pytest.mark.parametrize("rank", [1, 4, 30])
def test_any_split_and_rank_is_the_best_of_its_rank(tmp_path: Path, split, rank: int) -> None:
    made = make_round(tmp_path)

    aggregate(
        [tmp_path / "round"],
        tmp_path / "out",
        AggregateOptions(rank=rank, split=split, verify=True),
    )

    for module in SHAPES:
        expected = expected_update(made, module, "raflora", rank)
        assert relative_error(written_update(tmp_path / "out", module), expected) < 2e-7


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float64", 1e-13), ("float32", 2e-7), ("float16", 1e-3), ("bfloat16", 8e-3)],
)
def test_every_dtype_is_written_within_its_rounding(tmp_path: Path, dtype, error: float) -> None:
    made = make_round(tmp_path)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(dtype=dtype, verify=True))
    aggregate(
        [tmp_path / "round"],
        tmp_path / "whole",
        AggregateOptions(dtype=dtype, rank=31, verify=True),
    )

    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    for module in SHAPES:
        expected = expected_update(made, module, "raflora", 6)
        assert relative_error(written_update(tmp_path / "out", module), expected) < error


def test_more_ranks_than_the_smaller_side_take_the_dense_route_with_the_same_accuracy(
    tmp_path: Path,
) -> None:
    specs = [Spec(f"c{i}", rank=6, samples=i + 1, seed=i) for i in range(5)]
    made = make_round(tmp_path, specs)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))

    for module in specs[0].shapes:
        expected = expected_update(made, module, "raflora", 6)
        assert relative_error(written_update(tmp_path / "out", module), expected) < 2e-7


def test_a_shared_scaling_is_kept_and_a_mixed_one_becomes_one(tmp_path: Path) -> None:
    shared = [Spec("a", rank=2, alpha=4), Spec("b", rank=4, alpha=8)]
    mixed = [Spec("c", rank=2, alpha=4), Spec("d", rank=4, alpha=4)]
    for name, specs in (("shared", shared), ("mixed", mixed)):
        make_round(tmp_path / name, specs)
        aggregate([tmp_path / name / "round"], tmp_path / name / "out")

    def config(name: str) -> dict[str, Any]:
        return json.loads((tmp_path / name / "out/adapter_config.json").read_text())

    assert (config("shared")["r"], config("shared")["lora_alpha"]) == (4, 8)
    assert (config("mixed")["r"], config("mixed")["lora_alpha"]) == (4, 4)


def test_one_client_alone_comes_back_with_its_update_and_scaling(tmp_path: Path) -> None:
    one = make(tmp_path, Spec("only", rank=3, alpha=6))
    for method in METHODS:
        out = tmp_path / method
        aggregate([one.folder], out, AggregateOptions(method=method))
        for module in one.factors:
            assert relative_error(written_update(out, module), one.update(module)) < 2e-7


def test_padding_can_be_trained_and_changes_nothing(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(rank=30))

    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    for module, (rows, columns) in SHAPES.items():
        B = tensors[f"base_model.model.{module}.lora_B.weight"]
        A = tensors[f"base_model.model.{module}.lora_A.weight"]
        directions = min(rows, columns, sum(one.factors[module][1].shape[0] for one in made))
        assert (B[:, directions:] == 0).all()
        assert A[directions:].abs().amax() <= columns**-0.5
        assert (A.abs().amax(dim=1) > 0).all()


def test_clients_that_trained_nothing_give_an_adapter_that_can_still_be_trained(
    tmp_path: Path,
) -> None:
    from safetensors.torch import save_file

    for one in make_round(tmp_path):
        path = one.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({k: t * ("lora_A" in k) for k, t in tensors.items()}, path)

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))

    assert report.energy_ratio is None
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(t.abs().amax(dim=1).min() > 0 for k, t in tensors.items() if "lora_A" in k)
    assert all((t == 0).all() for k, t in tensors.items() if "lora_B" in k)
    assert json.loads((tmp_path / "out/fedlora.json").read_text())["energy_ratio"] is None


@pytest.mark.parametrize("missing", ["renormalize", "zero"])
def test_a_module_that_a_client_lacks_counts_as_the_option_says(tmp_path: Path, missing) -> None:
    shapes = {"q": (12, 20), "v": (7, 20)}
    made = make_round(
        tmp_path,
        [
            Spec("a", rank=2, samples=30, shapes=shapes),
            Spec("b", rank=3, samples=10, shapes={"q": (12, 20)}),
        ],
    )

    options = AggregateOptions(method="flexlora", missing=missing)
    report = aggregate([tmp_path / "round"], tmp_path / "out", options)

    share = 1.0 if missing == "renormalize" else 0.75
    found = written_update(tmp_path / "out", "v")
    assert relative_error(found, share * made[0].update("v")) < 2e-7
    assert any("b has no factors of: v" in warning for warning in report.warnings)


def test_energy_instead_of_a_rank_keeps_that_much_in_every_module(tmp_path: Path) -> None:
    made = make_round(tmp_path)

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(energy=0.9))

    assert report.rank is not None
    kept = []
    for module in SHAPES:
        s = np.linalg.svd(expected_update(made, module, "raflora", None))[1] ** 2
        kept.append((s[: report.rank].sum() / s.sum(), s[: report.rank - 1].sum() / s.sum()))
    assert min(now for now, _ in kept) >= 0.9
    assert min(less for _, less in kept) < 0.9
    row = {row.name: row for row in report.modules}["layers.1.fc"]
    assert row.kept_energy == pytest.approx(kept[list(SHAPES).index("layers.1.fc")][0])


def test_previous_fills_the_partition_whose_holders_are_absent(tmp_path: Path) -> None:
    """The rank does not shrink, and the energy of the absent high ranks is still there."""
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "first", AggregateOptions(method="flexlora", rank=9))
    first = {module: written_update(tmp_path / "first", module) for module in SHAPES}
    low = [Spec(f"low{i}", rank=2, samples=5 + i, alpha=9, shapes=SHAPES) for i in range(2)]
    made = [make(tmp_path / "second", spec) for spec in low]

    for method in ("raflora", "residual"):
        options = AggregateOptions(method=method, previous=tmp_path / "first", verify=True)
        report = aggregate([tmp_path / "second"], tmp_path / method, options)

        assert report.rank == 9
        for module in SHAPES:
            given = [(*one.factors[module], one.samples) for one in made]
            expected = truncated(oracle.aggregate(method, given, first[module]), 9)
            assert relative_error(written_update(tmp_path / method, module), expected) < 1e-6
            tail = first[module] - truncated(first[module], 2)
            client = oracle.aggregate(method, given)
            assert relative_error(expected, client) > 0.1 * np.linalg.norm(tail) / np.linalg.norm(
                client
            )


def test_momentum_adds_the_step_between_the_last_two_globals(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    for number, specs in enumerate(([ROUND[0], ROUND[1]], [ROUND[2], ROUND[3]])):
        folders = [tmp_path / "round" / spec.name for spec in specs]
        aggregate(folders, tmp_path / f"global{number}")

    for method in ("flexlora", "raflora"):
        options = AggregateOptions(
            method=method,
            momentum=0.8,
            previous=tmp_path / "global1",
            before_previous=tmp_path / "global0",
            rank=31,
            verify=True,
        )
        aggregate([tmp_path / "round"], tmp_path / method, options)
        for module in SHAPES:
            g1, g0 = (written_update(tmp_path / f"global{n}", module) for n in (1, 0))
            given = [(*one.factors[module], one.samples) for one in made]
            expected = oracle.aggregate(method, given, g1) + 0.8 * (g1 - g0)
            assert relative_error(written_update(tmp_path / method, module), expected) < 1e-6


def test_the_svd_basis_makes_raflora_independent_of_how_clients_store_their_factors(
    tmp_path: Path,
) -> None:
    from safetensors.torch import save_file

    made = make_round(tmp_path)
    results = {}
    for turn in ("as made", "rotated"):
        for basis in ("stored", "svd"):
            out = tmp_path / f"{turn} {basis}"
            aggregate([tmp_path / "round"], out, AggregateOptions(basis=basis))
            results[turn, basis] = written_update(out, "layers.1.fc")
        for one in made:
            path = one.folder / "adapter_model.safetensors"
            tensors = load_file(path)
            for module, (B, A, _) in one.factors.items():
                Q = np.linalg.qr(np.random.default_rng(3).normal(size=(A.shape[0],) * 2))[0]
                key = f"base_model.model.{module}.lora_"
                tensors[key + "B.weight"] = torch.from_numpy(B @ Q).float()
                tensors[key + "A.weight"] = torch.from_numpy(Q.T @ A).float()
            save_file(tensors, path)

    assert relative_error(results["rotated", "svd"], results["as made", "svd"]) < 1e-5
    assert relative_error(results["rotated", "stored"], results["as made", "stored"]) > 0.01


def test_heads_are_averaged_by_samples_and_counters_rounded(tmp_path: Path) -> None:
    def spec(name: str, samples: float, value: float, count: int) -> Spec:
        tensors = {
            "score.weight": torch.full((3, 4), value),
            "score.norm.num_batches_tracked": torch.tensor(count),
        }
        config = {"modules_to_save": ["score"]}
        return Spec(name, rank=2, samples=samples, tensors=tensors, config=config)

    make_round(tmp_path, [spec("a", 30, 1.0, 10), spec("b", 10, 5.0, 13), Spec("c", 3, samples=99)])

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))

    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert (tensors["base_model.model.score.weight"] == 2.0).all()
    assert tensors["base_model.model.score.norm.num_batches_tracked"] == 11
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    assert any("c has no tensor: score" in warning for warning in report.warnings)


def test_a_rank_index_without_weight_is_padded_not_dead(tmp_path: Path) -> None:
    """Zero in both factors could never be trained."""
    make_round(tmp_path, [Spec("a", 2, samples=30), Spec("b", 6, samples=0)])
    for method in ("fedavg", "rbla"):
        aggregate(
            [tmp_path / "round"], tmp_path / method, AggregateOptions(method=method, verify=True)
        )
        tensors = load_file(tmp_path / method / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            if "lora_A" in key:
                assert tensor.shape[0] == 6
                assert tensor.abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ffa"])
def test_a_module_that_only_clients_without_samples_adapt_is_there_and_can_train(
    tmp_path: Path, method: str
) -> None:
    shapes = {"q": (12, 20), "v": (7, 20)}
    given = [
        Spec("a", 2, samples=30, shapes={"q": (12, 20)}),
        Spec("b", 3, samples=0, shapes=shapes),
    ]
    make_round(tmp_path, given)

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method=method, verify=True))

    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    if method != "hetlora":  # which counts norms, not samples
        assert (tensors["base_model.model.v.lora_B.weight"] == 0).all()
    assert tensors["base_model.model.v.lora_A.weight"].abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("side", ["lora_A", "lora_B", "both"])
@pytest.mark.parametrize("method", ["raflora", "fedavg", "hetlora", "flora"])
def test_a_client_whose_update_is_zero_is_told(tmp_path: Path, side: str, method: str) -> None:
    """It has samples, so it counts: the update of the others is made smaller by it."""
    for name in ("idle", "ann", "bob"):
        made = make(tmp_path / "round", Spec(name, rank=2, samples=5))
        path = made.folder / "adapter_model.safetensors"
        zeroed = {
            key: 0 * tensor if name == "idle" and (side == "both" or side in key) else tensor
            for key, tensor in load_file(path).items()
        }
        save_file(zeroed, path)

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method=method))
    dry = aggregate(
        [tmp_path / "round"], tmp_path / "no", AggregateOptions(method=method, dry_run=True)
    )

    told = "the update of idle is zero in every module: it is untrained, and still counts"
    assert [warning for warning in report.warnings if "is zero" in warning] == [told]
    assert told in json.loads((tmp_path / "out/fedlora.json").read_text())["warnings"]
    assert not [warning for warning in dry.warnings if "is zero" in warning]  # not known yet
