"""Paths in the folder of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora_cli.simulation.arm import Arm, short

#: The setting that all runs of a folder share.
SETTING = "simulation.json"
#: The clients with their rows, if the data fix them, in the form of --clients-from.
CLIENTS = "clients.json"
#: The lock of the process that works in the folder, as `files.alone` names it.
LOCK = ".lock"
#: The report of the last call, as `--json` prints it.
REPORT = "report.json"
#: The metrics of a round, written last. A round without them is unfinished.
METRICS = "metrics.json"
#: The report of `fedlora diagnose` on all rounds of a run.
DIAGNOSIS = "diagnosis.json"


@dataclass(frozen=True)
class Run:
    """An arm at a learning rate with a seed."""

    arm: Arm
    rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        return seed_folder(root, self.seed) / f"{self.arm.name}-lr{short(self.rate)}"


def seed_folder(root: Path, seed: int) -> Path:
    return root / f"seed-{seed}"


def start_folder(root: Path, seed: int) -> Path:
    """The initial adapters of a seed, one for each rank, from `fedlora init`."""
    return seed_folder(root, seed) / "start"


def round_folder(run: Path, number: int) -> Path:
    """A round of a run, counted from 1: `clients/` and `global/`, as other commands expect."""
    return run / f"round-{number:02}"
