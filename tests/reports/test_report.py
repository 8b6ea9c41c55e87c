"""What the report says, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.adapters import Spec
from support.rounds import SHAPES, expected_update, make_round

from fedlora_cli import AggregateOptions, InputError, aggregate


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
    norms = [sum((s**2).sum() for s in values) ** 0.5 for values in (spectra, reference)]
    assert [report.norm, report.flexlora_norm] == pytest.approx(norms)
    assert [row.weight for row in report.clients] == [0.6, 0.3, 0.1]
    assert [row.max_weight for row in report.clients] == pytest.approx([0.6, 0.75, 1.0])
    partitions = [(row.first, row.last, row.holders, row.coverage) for row in report.partitions]
    assert partitions == [(1, 2, 3, 1.0), (3, 3, 2, 0.4), (4, 6, 1, 0.1)]
    assert sum(row.energy for row in report.partitions) == pytest.approx(1)
    assert any("rank index 4-6 comes from c alone, with weight 1.00" in w for w in report.warnings)
    for row, one in zip(report.clients, made, strict=True):
        own = [np.linalg.svd(one.update(m), compute_uv=False)[: row.rank] for m in one.factors]
        np.testing.assert_allclose(row.energy, sum(s**2 for s in own), rtol=1e-9)
    for described, s in zip(report.modules, spectra, strict=True):
        np.testing.assert_allclose(described.singular_values, s, rtol=1e-6)


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
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(quorum=0.25))

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

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(dry_run=True))

    assert not (tmp_path / "out").exists()
    assert (report.rank, report.shared_rank, report.energy_ratio) == (6, 2, None)
    with pytest.raises(InputError, match="holds 1 NaN or infinite values"):
        aggregate([tmp_path / "round"], tmp_path / "out")


def test_missing_zero_says_where_it_changes_nothing(tmp_path: Path) -> None:
    make_round(tmp_path, [Spec("a", 2, samples=30), Spec("b", 3, samples=10)])

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(missing="zero"))

    assert any("--missing zero changes nothing under raflora" in w for w in report.warnings)


def test_a_rank_index_that_one_client_owns_in_one_module_is_told(tmp_path: Path) -> None:
    make_round(
        tmp_path,
        [
            Spec("big", rank=4, samples=200, shapes=SHAPES, ranks={"layers.0.q_proj": 2}),
            Spec("small", rank=4, samples=2, shapes=SHAPES),
        ],
    )

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    expected = "rank index 3-4 comes from small alone in 1 of 3 modules, with weight 1.00 for 0.01"
    assert any(expected in warning for warning in report.warnings)


def test_a_quorum_without_a_previous_adapter_says_what_is_lost(tmp_path: Path) -> None:
    make_round(tmp_path)

    for number, options in enumerate(
        (AggregateOptions(quorum=0.9), AggregateOptions(method="residual"))
    ):
        report = aggregate([tmp_path / "round"], tmp_path / f"out{number}", options)
        assert any(
            "without --previous, the weight that clients leave" in w for w in report.warnings
        )
    plain = aggregate([tmp_path / "round"], tmp_path / "plain")
    assert not any("without --previous" in warning for warning in plain.warnings)


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


def test_choices_of_training_that_differ_are_told(tmp_path: Path) -> None:
    configs = [{"lora_dropout": 0.1, "fan_in_fan_out": True}, {"lora_dropout": 0.2}]
    make_round(tmp_path, [Spec(n, 2, config=c) for n, c in zip("ab", configs, strict=True)])

    report = aggregate([tmp_path / "round"], tmp_path / "out")

    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["lora_dropout"], config["fan_in_fan_out"]) == (0.0, False)
    for field in ("lora_dropout", "fan_in_fan_out"):
        assert any(f"the clients differ in {field}" in warning for warning in report.warnings)
