"""Where everything is in the folder of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora_cli.simulation.options import Arm, short

#: The setting that all runs of a folder share.
SETTING = "simulation.json"
#: What a process holds while it is at work there, as `files.alone` names it.
LOCK = ".lock"
#: The report of the last call, as `--json` prints it.
REPORT = "report.json"
#: Written last into the folder of a round: what it came to. A round without it is not whole.
METRICS = "metrics.json"
#: What `fedlora diagnose` says of all rounds of a run.
DIAGNOSIS = "diagnosis.json"


@dataclass(frozen=True)
class Run:
    """One arm at one learning rate with one seed."""

    arm: Arm
    rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        return seed_folder(root, self.seed) / f"{self.arm.name}-lr{short(self.rate)}"


def seed_folder(root: Path, seed: int) -> Path:
    return root / f"seed-{seed}"


def start_folder(root: Path, seed: int) -> Path:
    """The initial adapters of a seed, one for every rank: what `fedlora init` writes."""
    return seed_folder(root, seed) / "start"


def round_folder(run: Path, number: int) -> Path:
    """A round of a run, counted from 1: `clients/` and `global/`, as other commands expect."""
    return run / f"round-{number:02}"
