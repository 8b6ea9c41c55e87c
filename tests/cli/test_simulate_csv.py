"""`fedlora simulate --csv`: a row for each round of each arm, rate and seed, atomically."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.cli import run
from support.simulate_reports import PLAIN, simulation

from fedlora_cli.simulation import simulate as workflow
from fedlora_cli.simulation.arm import Arm
from fedlora_cli.simulation.places import METRICS, Run, round_folder

ROOT = Path(__file__).parents[2]

COLUMNS = (
    "arm,method,quorum,momentum,learning_rate,seed,round,clients,diverged,loss,"
    "validation_accuracy,accuracy,energy_ratio,norm,bytes_up,bytes_down,client_seconds,"
    "server_seconds"
)


def metrics(number: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number, "diverged": None, "clients": ["client-1", "client-2"],
        "loss": 1 / 3, "energy_ratio": 0.1 + 0.2, "norm": 5e-324, "bytes_up": 10**12,
        "bytes_down": 7, "client_seconds": 0.25, "server_seconds": 1e-7,
    } | more  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of two arms with two seeds: one seldom scored, one that diverged in round 2."""
    scored = {"validation": 0.5, "accuracy": 2 / 3}
    lost = {"round": 2, "diverged": "client-2 diverged", "clients": ["client-1", "client-2"]}
    courses = {
        ("flexlora", 0): [metrics(1), metrics(2, **scored)],
        ("flexlora", 3): [metrics(1, energy_ratio=None), metrics(2, **scored)],
        ("raflora", 0): [metrics(1), lost],
        ("raflora", 3): [metrics(1), metrics(2, **scored), metrics(3, **scored)],
    }
    for (method, seed), rounds in courses.items():
        arm = Arm(method, 0.5 if method == "raflora" else None, momentum=0.8)
        for one in rounds:
            place = round_folder(Run(arm, 7e-4, seed).folder(tmp_path), one["round"])
            place.mkdir(parents=True)
            (place / METRICS).write_text(json.dumps(one))
    monkeypatch.setattr(workflow, "simulate", lambda *_: simulation(PLAIN))
    return tmp_path


def rows(folder: Path) -> list[dict[str, str]]:
    result = run(
        "simulate", "-o", folder, "-m", "flexlora,raflora:quorum=0.5", "--momentum", 0.8,
        "--seeds", "0,3", "--rounds", 2, "--csv", folder / "rounds.csv",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"wrote: {folder / 'rounds.csv'}" in result.stderr
    text = (folder / "rounds.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    return list(csv.DictReader(text.splitlines()))


def test_the_documents_describe_all_columns() -> None:
    text = (ROOT / "fedlora_cli/cli/README.md").read_text()
    table = text.partition("| column | holds |\n")[2].partition("\n\n")[0]

    named = [
        name
        for line in table.splitlines()[1:]
        for name in re.findall("`(\\w+)`", line.split("|")[1])
    ]
    assert named == COLUMNS.split(",")


def test_there_is_a_row_for_each_round_with_all_digits(folder: Path) -> None:
    found = rows(folder)

    assert [(row["arm"], row["seed"], row["round"]) for row in found] == [
        (arm, seed, number)
        for arm in ("flexlora-b0.8", "raflora-q0.5-b0.8")
        for seed in "03"
        for number in "12"
    ]
    first, second = found[:2]
    assert (first["method"], first["quorum"], first["momentum"]) == ("flexlora", "", "0.8")
    assert (float(first["learning_rate"]), first["clients"]) == (7e-4, "2")
    assert (first["accuracy"], first["validation_accuracy"]) == ("", "")
    assert float(first["loss"]) == 1 / 3
    assert float(first["energy_ratio"]) == 0.1 + 0.2
    assert float(first["norm"]) == 5e-324
    assert (int(first["bytes_up"]), int(first["bytes_down"])) == (10**12, 7)
    assert (float(first["client_seconds"]), float(first["server_seconds"])) == (0.25, 1e-7)
    assert (float(second["accuracy"]), second["validation_accuracy"]) == (2 / 3, "0.5")
    assert found[2]["energy_ratio"] == ""


def test_a_diverged_round_has_a_row_without_numbers(folder: Path) -> None:
    row = rows(folder)[5]

    assert (row["arm"], row["seed"], row["round"]) == ("raflora-q0.5-b0.8", "0", "2")
    assert row["diverged"] == "true"
    assert {row[name] for name in ("loss", "accuracy", "norm", "bytes_up", "client_seconds")} == {
        ""
    }


def test_the_file_is_replaced_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(folder)
    before = (folder / "rounds.csv").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedlora_cli.files.output.flush", full)
    result = run("simulate", "-o", folder, "--seeds", "0,3", "--csv", folder / "rounds.csv")

    assert result.exit_code == 4
    assert "rounds.csv: cannot be written (no space left on device)" in result.stderr
    assert (folder / "rounds.csv").read_bytes() == before
    assert not list(folder.glob(".rounds.csv*"))


@pytest.mark.parametrize(
    ("name", "message", "code"),
    [
        ("rounds.txt", "--csv: rounds.txt has no known ending; use one of .csv", 2),
        ("none/rounds.csv", "its parent folder does not exist; mkdir -p none", 4),
        (".csv", "has no known ending", 2),
    ],
)
def test_a_file_that_cannot_be_written_is_known_before_the_work(
    name: str, message: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(workflow, "simulate", None)  # it would fail

    result = run("simulate", "-o", "run", "--csv", name)

    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
