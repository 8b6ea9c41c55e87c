"""The samples are what their script makes, small, and good for the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora_cli import AggregateOptions, aggregate, read_clients

SAMPLES = Path(__file__).parents[2] / "samples"


def test_the_round_holds_clients_of_different_ranks_and_sample_counts() -> None:
    cohort = read_clients([SAMPLES / "round-01"]).cohort

    assert len(cohort.clients) >= 6
    assert (cohort.shared_rank, cohort.rank) == (2, 16)
    assert len(set(cohort.samples)) >= 6
    assert cohort.metadata.base_model == "samples/base"
    assert cohort.notes == ()


def test_the_samples_are_small_and_name_no_machine() -> None:
    files = [
        path for path in SAMPLES.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    ]

    assert sum(path.stat().st_size for path in files) < 4_000_000
    for path in files:
        if path.suffix == ".json":
            assert "/home/" not in path.read_text()
            json.loads(path.read_text())


@pytest.mark.long
def test_the_script_makes_the_samples_again(tmp_path: Path) -> None:
    """The same files, shapes and configs; values as close as training on another processor is."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SAMPLES / "make_samples.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=environment)

    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {
        path.relative_to(SAMPLES)
        for folder in ("base", "round-01")
        for path in (SAMPLES / folder).rglob("*")
        if path.is_file()
    }
    assert made == kept
    for path in sorted(made):
        if path.name == "adapter_config.json":
            ours, theirs = (json.loads((root / path).read_text()) for root in (SAMPLES, tmp_path))
            for key in ("r", "lora_alpha", "target_modules", "modules_to_save"):
                assert ours[key] == theirs[key]
        elif path.name == "fedlora.json":
            assert (SAMPLES / path).read_text() == (tmp_path / path).read_text()
        elif path.name == "adapter_model.safetensors":
            ours, theirs = load_file(SAMPLES / path), load_file(tmp_path / path)
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", ["raflora", "flexlora"])
def test_the_global_adapter_recognises_digits_that_the_base_has_never_seen(
    tmp_path: Path, method: str
) -> None:
    """The base knows 0-4 only; the clients' adapters together know all ten."""
    from peft import PeftModel
    from sklearn.datasets import load_digits
    from transformers import ViTForImageClassification

    aggregate([SAMPLES / "round-01"], tmp_path / "global", AggregateOptions(method=method))
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    unseen = labels >= 5

    def accuracy(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((model(images[unseen]).logits.argmax(1) == labels[unseen]).float().mean())

    base = ViTForImageClassification.from_pretrained(SAMPLES / "base")
    before = accuracy(base)
    after = accuracy(PeftModel.from_pretrained(base, str(tmp_path / "global")))

    assert before < 0.01
    assert after > 0.5


@pytest.mark.parametrize(("method", "share"), [("flexlora", 0.91), ("raflora", 0.83)])
def test_the_sample_rounds_are_as_accurate_as_the_readme_says(method: str, share: float) -> None:
    """On the digits that `make_samples.py` holds out."""
    from peft import PeftModel
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from transformers import ViTForImageClassification

    digits = load_digits()
    _, held_out = train_test_split(
        range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=822
    )
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[held_out] / 8 - 1
    labels = torch.tensor(digits.target)[held_out]
    base = ViTForImageClassification.from_pretrained(SAMPLES / "base")
    model = PeftModel.from_pretrained(base, str(SAMPLES / "rounds" / method / "round-08")).eval()
    with torch.no_grad():
        found = float((model(images).logits.argmax(1) == labels).float().mean())

    assert found == pytest.approx(share, abs=0.02)
    page = (SAMPLES.parent / "fedlora_cli/analysis/README.md").read_text()
    assert f"{100 * share:.0f} %" in page.split("A collapse is a fact", 1)[1].split("\n\n", 1)[0]


@pytest.mark.long
def test_the_script_makes_the_first_of_the_sample_rounds_again(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(SAMPLES / "make_rounds.py"), "--rounds", "1"]
    subprocess.run([*script, "--output", str(tmp_path)], check=True, capture_output=True,
                   env=environment)  # fmt: skip

    for method in ("flexlora", "raflora"):
        ours, theirs = (root / method / "round-01" for root in (SAMPLES / "rounds", tmp_path))
        reports = [json.loads((folder / "fedlora.json").read_text()) for folder in (ours, theirs)]
        assert reports[0]["energy_ratio"] == pytest.approx(reports[1]["energy_ratio"], abs=0.01)
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        assert [row["path"] for row in reports[0]["clients"]] == [
            row["path"] for row in reports[1]["clients"]
        ]
