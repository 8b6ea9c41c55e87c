"""The output folder: the same bytes, whole or not at all, and in nobody's way."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from makers import Spec
from rounds import make_round
from safetensors.torch import load_file

from fedlora_cli import (
    InputError,
    Options,
    OutputError,
    aggregate,
)


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


def test_a_global_adapter_can_be_renewed_in_place(tmp_path: Path) -> None:
    """Read whole before it is replaced, and only with --force."""
    make_round(tmp_path)
    out = tmp_path / "global"
    aggregate([tmp_path / "round"], out)
    before = (out / "adapter_model.safetensors").read_bytes()

    with pytest.raises(OutputError, match="--force"):
        aggregate([tmp_path / "round"], out, Options(previous=out, quorum=0.9))
    client = tmp_path / "round/ann"
    with pytest.raises(InputError, match="inside the input"):
        aggregate([client], client, Options(previous=client, force=True))
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
