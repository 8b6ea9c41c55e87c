"""The sample plug-in, installed: TIES in every command, against TIES entry by entry."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.adapters import Made, relative_error, truncated, written_update
from support.plugins import install
from support.rounds import make_round

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "samples/plugin"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed plug-in."""
    return install(PLUGIN, tmp_path_factory.mktemp("plugin") / "site")


def fedlora(
    target: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, with the plug-in on its path."""
    return subprocess.run(
        [sys.executable, "-m", "fedlora_cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(target), "COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
    )


def ties(updates: list[np.ndarray], samples: list[float], density: float) -> np.ndarray:
    """TIES of arXiv:2306.01708, section 3, one entry at a time, weighted by samples."""
    trimmed = []
    for update in updates:
        largest = sorted(np.abs(update).ravel(), reverse=True)
        threshold = largest[max(1, round(density * update.size)) - 1]
        trimmed.append(np.where(np.abs(update) >= threshold, update, 0.0))
    merged = np.zeros(updates[0].shape)
    for entry in np.ndindex(merged.shape):
        values = [(float(one[entry]), n) for one, n in zip(trimmed, samples, strict=True)]
        elected = np.sign(sum(n * value for value, n in values))
        agreeing = [(value, n) for value, n in values if value and np.sign(value) == elected]
        if agreeing:
            merged[entry] = sum(n * v for v, n in agreeing) / sum(n for _, n in agreeing)
    return merged


def expected(made: list[Made], module: str, rank: int) -> tuple[np.ndarray, float]:
    """The update to write, and the energy that it keeps."""
    updates, samples = [one.update(module) for one in made], [one.samples for one in made]
    whole = ties(updates, samples, density=0.2)
    best = truncated(whole, rank)
    return best, float(np.linalg.norm(best) ** 2 / np.linalg.norm(whole) ** 2)


@pytest.mark.parametrize("rank", [None, 2, 13])
def test_the_installed_method_writes_ties(tmp_path: Path, target: Path, rank: int | None) -> None:
    made = make_round(tmp_path)

    done = fedlora(
        target, "aggregate", tmp_path / "round", "-o", tmp_path / "out", "-m", "ties", "--verify",
        "--json", "--dtype", "float64", *([] if rank is None else ["--rank", rank]),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["method"], report["distribution"]) == ("ties", "fedlora-ties 0.1")
    for row in report["modules"]:
        update, kept = expected(made, row["name"], rank or 6)  # 6 is the largest client rank
        assert relative_error(written_update(tmp_path / "out", row["name"]), update) < 1e-10
        assert row["kept_energy"] == pytest.approx(kept, rel=1e-9)
    # The sum of all entries has full rank: 13 rows need 13 directions.
    v_proj = next(row for row in report["modules"] if row["name"] == "layers.0.v_proj")
    assert (v_proj["kept_energy"] == pytest.approx(1.0)) == (rank == 13)


def test_processes_write_the_same_bytes(tmp_path: Path, target: Path) -> None:
    make_round(tmp_path)
    command = ("aggregate", tmp_path / "round", "-m", "ties", "-o")

    here = fedlora(target, *command, tmp_path / "here")
    there = fedlora(target, *command, tmp_path / "there", "--cluster", "processes:2")

    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    file = "adapter_model.safetensors"
    assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


def test_a_dry_run_tells_that_there_is_no_choice_of_routes(tmp_path: Path, target: Path) -> None:
    make_round(tmp_path)

    done = fedlora(
        target, "aggregate", tmp_path / "round", "-o", tmp_path / "out", "-m", "ties",
        "--dry-run", "--explain",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "ties needs all factors of a module at once: there is no choice" in done.stdout


def test_every_list_of_methods_has_it(tmp_path: Path, target: Path) -> None:
    make_round(tmp_path)
    round_ = tmp_path / "round"

    assert "Installed: ties." in fedlora(target, "aggregate", "--help").stdout
    assert "Installed: ties." in re.sub(
        r"[│\s]+", " ", fedlora(target, "simulate", "--help").stdout
    )
    assert "fedlora-ties 0.1" in fedlora(target, "methods").stdout
    listed = json.loads(fedlora(target, "methods", "--json").stdout)["methods"]
    assert listed[-1] == {
        "name": "ties",
        "summary": "largest entries, merged where their signs agree",
        "formula": "n_k / N, among the clients of the elected sign",
        "source": "arXiv:2306.01708",
        "merge": "fedlora_ties:merge",
        "compress": "svd",
        "basis_free": True,
        "uses_previous": False,
        "distribution": "fedlora-ties 0.1",
    }
    compared = json.loads(fedlora(target, "compare", round_, "--json").stdout)
    assert compared["methods"][-1]["name"] == "ties"
    assert compared["distributions"] == {"ties": "fedlora-ties 0.1"}
    assert (
        "did you mean ties?" in fedlora(target, "aggregate", round_, "-o", "x", "-m", "tie").stderr
    )
    refused = fedlora(target, "predict", round_)
    assert "method ties of fedlora-ties 0.1 has no forecast" in refused.stdout + refused.stderr


@pytest.mark.parametrize("command", ["aggregate", "simulate"])
def test_completion_knows_it_without_importing_it(
    tmp_path: Path, target: Path, command: str
) -> None:
    site = install(PLUGIN, tmp_path / "site")
    (site / "fedlora_ties.py").write_text("raise SystemExit('imported')")
    typed = f"fedlora {command} --method t"

    done = fedlora(
        site, _FEDLORA_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD="3"
    )  # fmt: skip

    assert done.stdout.split() == ["ties"], done.stderr


def test_each_module_has_the_trim_of_its_own_entries(tmp_path: Path, target: Path) -> None:
    """A fifth of each matrix is kept, and all entries of equal size stay together."""
    program = (
        "import torch, fedlora_ties\n"
        "update = torch.tensor([[5.0, -4.0, 3.0, 2.0, 1.0], [0.0, 4.0, 0.5, -0.5, 2.5]])\n"
        "print(fedlora_ties.trim(update).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [[5.0, -4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0, 0.0]]


@pytest.mark.long
def test_a_simulation_trains_with_it_in_several_processes(tmp_path: Path, target: Path) -> None:
    done = fedlora(
        target, "simulate", "-o", tmp_path / "run", "-m", "flexlora,ties", "--rounds", 2,
        "--seeds", 1, "--cohort", "2x2,1x4", "--limit", 200, "--jobs", 2, "--json",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["method"] for row in report["arms"]] == ["flexlora", "ties"]
    assert report["distributions"] == {"ties": "fedlora-ties 0.1"}
    assert all(row["accuracy"]["mean"] > 0 for row in report["arms"])
