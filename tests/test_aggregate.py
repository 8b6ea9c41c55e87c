"""The main job on files: exact against the dense oracle, reproducible, whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from makers import Made, Spec, make, relative_error, truncated, written_update
from safetensors import safe_open
from safetensors.torch import load_file

from fedlora_cli import (
    METHODS,
    InputError,
    Options,
    OutputError,
    UsageError,
    VerificationError,
    aggregate,
)

SHAPES = {"layers.0.q_proj": (24, 40), "layers.0.v_proj": (13, 40), "layers.1.fc": (40, 31)}

#: Mixed ranks, alphas, rsLoRA, patterns and sample counts, none of them square or equal.
ROUND = [
    Spec("ann", rank=2, samples=30, alpha=16, shapes=SHAPES),
    Spec("bob", rank=5, samples=11, alpha=3, rslora=True, shapes=SHAPES),
    Spec("cy", rank=3, samples=50, alpha=7, shapes=SHAPES, ranks={"layers.1.fc": 6}),
    Spec("dee", rank=4, samples=9, shapes=SHAPES, alphas={"layers.0.q_proj": 32}),
]


def make_round(root: Path, specs: list[Spec] = ROUND) -> list[Made]:
    return [make(root / "round", spec) for spec in specs]


def expected_update(made: list[Made], module: str, method: str, rank: int | None) -> np.ndarray:
    given = [(*one.factors[module], one.samples) for one in made if module in one.factors]
    update = oracle.aggregate(method, given)
    return update if rank is None else truncated(update, rank)


def share_A(made: list[Made]) -> None:
    """Give all clients the rows of one A, as FFA-LoRA trains them."""
    from safetensors.torch import save_file

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

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(method=method, verify=True))

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

    aggregate([tmp_path / "round"], tmp_path / "out", Options(rank=rank, split=split, verify=True))

    for module in SHAPES:
        expected = expected_update(made, module, "raflora", rank)
        assert relative_error(written_update(tmp_path / "out", module), expected) < 2e-7


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float64", 1e-13), ("float32", 2e-7), ("float16", 1e-3), ("bfloat16", 8e-3)],
)
def test_every_dtype_is_written_within_its_rounding(tmp_path: Path, dtype, error: float) -> None:
    made = make_round(tmp_path)

    aggregate([tmp_path / "round"], tmp_path / "out", Options(dtype=dtype, verify=True))
    aggregate([tmp_path / "round"], tmp_path / "whole", Options(dtype=dtype, rank=31, verify=True))

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

    aggregate([tmp_path / "round"], tmp_path / "out", Options(verify=True))

    for module in specs[0].shapes:
        expected = expected_update(made, module, "raflora", 6)
        assert relative_error(written_update(tmp_path / "out", module), expected) < 2e-7


def test_a_shared_scaling_is_kept_and_a_mixed_one_becomes_one(tmp_path: Path) -> None:
    shared = [Spec("a", rank=2, alpha=4), Spec("b", rank=4, alpha=8)]
    mixed = [Spec("c", rank=2, alpha=4), Spec("d", rank=4, alpha=4)]
    for name, specs in (("shared", shared), ("mixed", mixed)):
        make_round(tmp_path / name, specs)
        aggregate([tmp_path / name / "round"], tmp_path / name / "out")

    def config(name: str) -> dict:
        return json.loads((tmp_path / name / "out/adapter_config.json").read_text())

    assert (config("shared")["r"], config("shared")["lora_alpha"]) == (4, 8)
    assert (config("mixed")["r"], config("mixed")["lora_alpha"]) == (4, 4)


def test_one_client_alone_comes_back_with_its_update_and_scaling(tmp_path: Path) -> None:
    one = make(tmp_path, Spec("only", rank=3, alpha=6))
    for method in METHODS:
        out = tmp_path / method
        aggregate([one.folder], out, Options(method=method))
        for module in one.factors:
            assert relative_error(written_update(out, module), one.update(module)) < 2e-7


def test_same_bytes_for_any_order_of_clients_and_any_number_of_jobs(tmp_path: Path) -> None:
    folders = [one.folder for one in make_round(tmp_path)]
    written = set()
    for number, (order, jobs) in enumerate(
        itertools.product([folders, folders[::-1], folders[2:] + folders[:2]], [1, 2, 5])
    ):
        out = tmp_path / f"out{number}"
        aggregate(order, out, Options(jobs=jobs))
        written.add(tuple((path.name, path.read_bytes()) for path in sorted(out.iterdir())))

    assert len(written) == 1
    assert [name for name, _ in written.pop()] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedlora.json",
    ]


@pytest.mark.parametrize("method", ["flexlora", "fedavg"])
def test_same_bytes_for_any_number_of_jobs_on_modules_that_lapack_would_split(
    tmp_path: Path, method: str
) -> None:
    """In float64, where nothing is rounded away; every report as well."""
    shapes = {f"layers.{i}.fc": (333, 257 + i) for i in range(6)}
    make_round(
        tmp_path, [Spec(name, rank=30, samples=9, shapes=shapes) for name in ("a", "b", "c")]
    )
    written = set()
    for number, jobs in enumerate([1, 2, 3, 2]):
        out = tmp_path / f"out{number}"
        aggregate([tmp_path / "round"], out, Options(jobs=jobs, method=method, dtype="float64"))
        written.add(tuple(path.read_bytes() for path in sorted(out.iterdir())))

    assert len(written) == 1


def test_padding_can_be_trained_and_changes_nothing(tmp_path: Path) -> None:
    made = make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "out", Options(rank=30))

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

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(verify=True))

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

    options = Options(method="flexlora", missing=missing)
    report = aggregate([tmp_path / "round"], tmp_path / "out", options)

    share = 1.0 if missing == "renormalize" else 0.75
    found = written_update(tmp_path / "out", "v")
    assert relative_error(found, share * made[0].update("v")) < 2e-7
    assert any("b has no factors of: v" in warning for warning in report.warnings)


def test_energy_instead_of_a_rank_keeps_that_much_in_every_module(tmp_path: Path) -> None:
    made = make_round(tmp_path)

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(energy=0.9))

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
    aggregate([tmp_path / "round"], tmp_path / "first", Options(method="flexlora", rank=9))
    first = {module: written_update(tmp_path / "first", module) for module in SHAPES}
    low = [Spec(f"low{i}", rank=2, samples=5 + i, alpha=9, shapes=SHAPES) for i in range(2)]
    made = [make(tmp_path / "second", spec) for spec in low]

    for method in ("raflora", "residual"):
        options = Options(method=method, previous=tmp_path / "first", verify=True)
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
        options = Options(
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
            aggregate([tmp_path / "round"], out, Options(basis=basis))
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

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(verify=True))

    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert (tensors["base_model.model.score.weight"] == 2.0).all()
    assert tensors["base_model.model.score.norm.num_batches_tracked"] == 11
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    assert any("c has no tensor: score" in warning for warning in report.warnings)


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    made = make_round(
        tmp_path, [Spec("a", 2, samples=60), Spec("b", 3, samples=30), Spec("c", 6, 10)]
    )

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    spectra, reference = [], []
    for module in made[0].factors:
        spectra.append(np.linalg.svd(expected_update(made, module, "raflora", None))[1][:6])
        reference.append(np.linalg.svd(expected_update(made, module, "flexlora", None))[1][:6])
    assert report.shared_rank == 2
    for ratio, values in (
        (report.energy_ratio, spectra),
        (report.flexlora_energy_ratio, reference),
    ):
        pooled = sum((s[:2] ** 2).sum() for s in values) / sum((s**2).sum() for s in values)
        assert ratio == pytest.approx(pooled, abs=1e-9)
    assert [row.weight for row in report.clients] == [0.6, 0.3, 0.1]
    assert [row.max_weight for row in report.clients] == pytest.approx([0.6, 0.75, 1.0])
    partitions = [(row.first, row.last, row.holders, row.coverage) for row in report.partitions]
    assert partitions == [(1, 2, 3, 1.0), (3, 3, 2, 0.4), (4, 6, 1, 0.1)]
    assert sum(row.energy for row in report.partitions) == pytest.approx(1)
    assert any("rank index 4-6 comes from c alone, with weight 1.00" in w for w in report.warnings)
    for row, s in zip(report.modules, spectra, strict=True):
        np.testing.assert_allclose(row.singular_values, s, rtol=1e-6)


def test_where_nobody_tells_a_sample_count_all_count_the_same_and_it_is_said(
    tmp_path: Path,
) -> None:
    make_round(tmp_path, [Spec("a", 2, samples=None), Spec("b", 2, samples=None)])

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    assert [row.weight for row in report.clients] == [0.5, 0.5]
    assert any("no sample counts found" in warning for warning in report.warnings)


def test_provenance_travels_with_the_weights(tmp_path: Path) -> None:
    import hashlib

    made = make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "out", Options(quorum=0.25))

    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    told = json.loads(metadata["fedlora"])
    assert told["method"] == "raflora"
    assert told["options"] == {"--quorum": "0.25"}
    digest = hashlib.sha256((made[0].folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert told["clients"][0] == {"name": "ann", "rank": 2, "samples": 30, "sha256": digest}
    card = (tmp_path / "out/README.md").read_text()
    assert 'base_model: "tiny/base"' in card
    assert f"| ann | 2 | 30 | 0.3000 | {digest[:16]} |" in card
    assert "fedlora aggregate CLIENTS -o OUTPUT --method raflora --quorum 0.25" in card
    assert str(tmp_path) not in card + metadata["fedlora"]


def test_a_dry_run_reads_headers_and_writes_nothing(tmp_path: Path) -> None:
    for one in make_round(tmp_path):
        path = one.folder / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-4:] = np.float32("nan").tobytes()  # a value that no run would accept
        path.write_bytes(content)

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(dry_run=True))

    assert not (tmp_path / "out").exists()
    assert (report.rank, report.shared_rank, report.energy_ratio) == (6, 2, None)
    with pytest.raises(InputError, match="holds 1 NaN or infinite values"):
        aggregate([tmp_path / "round"], tmp_path / "out")


def test_an_existing_target_needs_force_and_only_adapters_are_replaced(tmp_path: Path) -> None:
    make_round(tmp_path)
    out = tmp_path / "out"
    aggregate([tmp_path / "round"], out, Options(method="flexlora"))
    before = (out / "adapter_model.safetensors").read_bytes()

    with pytest.raises(OutputError, match=r"it exists already; .* --force"):
        aggregate([tmp_path / "round"], out)
    assert (out / "adapter_model.safetensors").read_bytes() == before

    aggregate([tmp_path / "round"], out, Options(force=True))
    assert (out / "adapter_model.safetensors").read_bytes() != before

    (out / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"it holds thesis\.tex"):
        aggregate([tmp_path / "round"], out, Options(force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "round"]


@pytest.mark.parametrize(
    "where", ["round/out", "round", "round/ann", "round/ann/out", "."], ids=lambda where: where
)
def test_an_output_inside_an_input_is_refused(tmp_path: Path, where: str) -> None:
    make_round(tmp_path)

    with pytest.raises(InputError, match="inside the input"):
        aggregate([tmp_path / "round"], tmp_path / where, Options(force=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "flora", "rank": 3}, "flora does not truncate"),
        ({"method": "fedavg", "energy": 0.9}, "fedavg does not truncate"),
        ({"method": "rbla", "momentum": 0.5}, "without two earlier global adapters"),
        ({"method": "flexlora", "quorum": 0.5}, "the rule of flexlora has no quorum"),
        ({"momentum": 0.5}, "without two earlier global adapters"),
        ({"rank": 99}, "no module has more than 31 directions"),
        ({"method": "rbla", "basis": "svd"}, "rbla averages factors"),
        ({"device": "abacus"}, "abacus cannot be used"),
    ],
)
def test_choices_that_contradict_each_other_are_usage_errors(
    tmp_path: Path, options, message
) -> None:
    make_round(tmp_path)

    with pytest.raises(UsageError, match=message):
        aggregate([tmp_path / "round"], tmp_path / "out", Options(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"momentum": 1.0},
        {"quorum": -0.1},
        {"jobs": -1},
        {"max_rank": 0},
        {"rank": 3, "energy": 0.5},
        {"energy": float("nan")},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_usage_errors(options) -> None:
    with pytest.raises(UsageError):
        Options(**options)


def test_a_client_above_the_largest_rank_is_refused(tmp_path: Path) -> None:
    make_round(tmp_path)

    with pytest.raises(InputError, match="cy: rank 6, above --max-rank 5"):
        aggregate([tmp_path / "round"], tmp_path / "out", Options(max_rank=5))


def test_overflow_of_the_output_dtype_is_an_error_not_an_infinity(tmp_path: Path) -> None:
    make_round(tmp_path, [replace(ROUND[0], alpha=1e12), ROUND[1]])

    with pytest.raises(InputError, match="leave the range of float16; give a wider --dtype"):
        aggregate(
            [tmp_path / "round"], tmp_path / "out", Options(dtype="float16", split="left", rank=2)
        )
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_run_leaves_nothing_that_looks_like_an_adapter(tmp_path: Path) -> None:
    """SIGTERM at any moment: the folder is whole or absent, and no temporary folder stays."""
    shapes = {f"layers.{i}.fc": (160, 200) for i in range(12)}
    make_round(tmp_path, [Spec(f"c{i}", rank=8, shapes=shapes, seed=i) for i in range(4)])
    outcomes = set()
    for delay in (0.0, 1.5, 2.0, 2.5, 3.0):
        command = [sys.executable, "-m", "fedlora_cli", "aggregate", "round", "-o", "out", "-f"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        os.kill(process.pid, signal.SIGTERM)
        outcomes.add(process.wait(timeout=60))
        names = {path.name for path in tmp_path.iterdir()}
        assert names <= {"round", "out"}
        if "out" in names:
            assert len(list((tmp_path / "out").iterdir())) == 4
            load_file(tmp_path / "out/adapter_model.safetensors")
    assert outcomes <= {0, 143, -signal.SIGTERM}


def write_wrong(adapter, folder, provenance, *, module: str, B: torch.Tensor) -> None:
    """What a defect between the algebra and the disk would do."""
    from fedlora_cli.formats import peft

    wrong = replace(adapter.factors[module], B=B)
    peft.write(replace(adapter, factors={**adapter.factors, module: wrong}), folder, provenance)


@pytest.mark.parametrize("size", [1e-3, 7e-4, 1e-4, 1e-6])
def test_verification_sees_a_wrong_direction_though_truncation_loses_more(
    tmp_path: Path, monkeypatch, size: float
) -> None:
    """A change outside of what the sum spans, far smaller than what truncation leaves out."""
    from fedlora_cli.rounds import aggregate as workflow

    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "good", Options(rank=2, verify=True))
    key = "base_model.model.layers.1.fc.lora_B.weight"
    B = load_file(tmp_path / "good/adapter_model.safetensors")[key]
    noise = torch.randn(B.shape, generator=torch.Generator().manual_seed(5))
    wrong = B + size * B.norm() * noise / noise.norm()

    class Defect:
        FILES, GlobalAdapter = workflow.peft.FILES, workflow.peft.GlobalAdapter

        @staticmethod
        def write(adapter, folder, provenance) -> None:
            write_wrong(adapter, folder, provenance, module="layers.1.fc", B=wrong)

    monkeypatch.setattr(workflow, "peft", Defect)
    with pytest.raises(VerificationError, match=r"layers\.1\.fc is off by"):
        aggregate([tmp_path / "round"], tmp_path / "bad", Options(rank=2, verify=True))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("method", ["raflora", "flexlora", "flora", "fedavg"])
@pytest.mark.parametrize("share", [0.0, 1e-3, 1e-9])
def test_clients_that_cancel_each_other_verify(tmp_path: Path, method: str, share: float) -> None:
    from safetensors.torch import save_file

    one = make(tmp_path / "round", Spec("a", rank=3, samples=10, shapes=SHAPES))
    other = make(tmp_path / "round", Spec("b", rank=3, samples=10, shapes=SHAPES))
    tensors = load_file(one.folder / "adapter_model.safetensors")
    opposite = {k: t * (-1 + share if "lora_B" in k else 1) for k, t in tensors.items()}
    save_file(opposite, other.folder / "adapter_model.safetensors")

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(method=method, verify=True))

    assert report.verification is not None
    if share == 0.0 and METHODS[method].compress == "svd":
        assert all(row.rank == 0 for row in report.modules)


def test_missing_zero_says_where_it_changes_nothing(tmp_path: Path) -> None:
    make_round(tmp_path, [Spec("a", 2, samples=30), Spec("b", 3, samples=10)])

    report = aggregate([tmp_path / "round"], tmp_path / "out", Options(missing="zero"))

    assert any("--missing zero changes nothing under raflora" in w for w in report.warnings)


def test_a_rank_index_that_one_client_owns_in_one_module_is_told(tmp_path: Path) -> None:
    make_round(
        tmp_path,
        [
            Spec("big", rank=4, samples=300, shapes=SHAPES, ranks={"layers.0.q_proj": 2}),
            Spec("small", rank=4, samples=2, shapes=SHAPES),
        ],
    )

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    expected = "rank index 3-4 comes from small alone in 1 of 3 modules, with weight 1.00 for 0.01"
    assert any(expected in warning for warning in report.warnings)


def test_a_quorum_without_a_previous_adapter_says_what_is_lost(tmp_path: Path) -> None:
    make_round(tmp_path)

    for number, options in enumerate((Options(quorum=0.9), Options(method="residual"))):
        report = aggregate([tmp_path / "round"], tmp_path / f"out{number}", options)
        assert any("without --previous, what the holders" in w for w in report.warnings)
    plain = aggregate([tmp_path / "round"], tmp_path / "plain")
    assert not any("without --previous" in warning for warning in plain.warnings)


def test_a_rank_index_without_weight_is_padded_not_dead(tmp_path: Path) -> None:
    """Zero in both factors could never be trained."""
    make_round(tmp_path, [Spec("a", 2, samples=30), Spec("b", 6, samples=0)])
    for method in ("fedavg", "rbla"):
        aggregate([tmp_path / "round"], tmp_path / method, Options(method=method, verify=True))
        tensors = load_file(tmp_path / method / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            if "lora_A" in key:
                assert tensor.shape[0] == 6
                assert tensor.abs().amax(dim=1).min() > 0


def test_a_global_adapter_can_be_renewed_in_place(tmp_path: Path) -> None:
    """Read whole before it is replaced, and only with --force."""
    make_round(tmp_path)
    out = tmp_path / "global"
    aggregate([tmp_path / "round"], out)
    before = (out / "adapter_model.safetensors").read_bytes()

    with pytest.raises(OutputError, match="--force"):
        aggregate([tmp_path / "round"], out, Options(previous=out, quorum=0.9))
    aggregate([tmp_path / "round"], out, Options(previous=out, quorum=0.9, force=True))
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    from fedlora_cli.rounds import aggregate as workflow

    make_round(tmp_path)
    really = workflow.model_card

    def slow(report):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").touch()
        return really(report)

    monkeypatch.setattr(workflow, "model_card", slow)
    with pytest.raises(OutputError, match="it exists already"):
        aggregate([tmp_path / "round"], tmp_path / "out")

    assert sorted(path.name for path in tmp_path.rglob("*.tex")) == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "round"]


def test_underflow_of_the_output_dtype_is_an_error_not_a_zero(tmp_path: Path) -> None:
    make_round(tmp_path, [replace(ROUND[0], alpha=1e-9), replace(ROUND[1], alpha=2e-9)])

    with pytest.raises(InputError, match="leave the range of float16"):
        aggregate([tmp_path / "round"], tmp_path / "out", Options(dtype="float16", split="left"))


def test_top_level_names_are_targets_that_match_nothing_else(tmp_path: Path) -> None:
    """As a list entry, `fc` would also match `mlp.fc`, which no client adapts."""
    import warnings

    from peft import PeftModel

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(6, 6)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.mlp = torch.nn.Linear(5, 4), Mlp()

    shapes = {"fc": (4, 5)}
    make_round(tmp_path, [Spec(name, rank=2, shapes=shapes) for name in "ab"])
    aggregate([tmp_path / "round"], tmp_path / "out", Options(verify=True))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(Model(), str(tmp_path / "out"))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"base_model.model.fc"}


def test_a_vanishing_piece_is_not_hidden_by_a_large_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for one, side in zip(make_round(tmp_path, ROUND[:2]), "BA", strict=True):
        path = one.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({k: t * (1e-9 if f"lora_{side}" in k else 1) for k, t in tensors.items()}, path)

    options = Options(method="flora", dtype="float16")
    with pytest.raises(InputError, match="leave the range of float16"):
        aggregate([tmp_path / "round"], tmp_path / "out", options)


def test_a_rank_that_only_the_previous_adapter_has_may_be_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2, shapes={"q": (9, 9)}))
    previous = make(tmp_path, Spec("old", rank=20, shapes={"q": (9, 9), "other.v": (40, 50)}))

    for rank in (17, 20, 40):
        options = Options(rank=rank, previous=previous.folder)
        assert aggregate([tmp_path / "round"], tmp_path / f"out{rank}", options).rank == rank
    with pytest.raises(UsageError, match="no module has more than 40 directions"):
        aggregate([tmp_path / "round"], tmp_path / "out", replace(options, rank=41))


def test_every_lone_holder_is_named(tmp_path: Path) -> None:
    shapes = {"m.q": (12, 20), "m.v": (7, 20)}
    specs = [
        Spec("a", rank=6, samples=9, shapes=shapes, ranks={"m.v": 3}),
        Spec("b", rank=6, samples=9, shapes=shapes, ranks={"m.q": 3}),
    ]
    make_round(tmp_path, specs)

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    for name in "ab":
        expected = f"rank index 4-6 comes from {name} alone in 1 of 2 modules, with weight 1.00"
        assert any(expected in warning for warning in report.warnings)
