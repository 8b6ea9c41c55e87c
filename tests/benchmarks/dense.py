"""Whole commands against dense SVDs of the same modules, on the same machine, in one run.

Twelve clients of ranks 8 to 64, four square modules in bfloat16. Commands are timed from outside:
Python's start, the import of torch, reading, computing, writing. The dense SVDs are one of every
module (torch, float32, all cores): what a server pays that forms the global update and decomposes
it. A diagnosis of the clients would take twelve times as many.

    python tests/benchmarks/dense.py [--size 4096] [--modules 4]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from makers import Spec, make

RANKS = (8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64)


@dataclass(frozen=True)
class Timing:
    """Seconds of the whole commands, and of the dense SVDs alone."""

    aggregate: float
    diagnose: float
    dense: float


def measure(root: Path, size: int, modules: int) -> Timing:
    """Make a round in `root` and time both."""
    shapes = {f"layers.{i}.proj": (size, size) for i in range(modules)}
    for k, rank in enumerate(RANKS):
        name = f"client-{k:02}"
        made = {"shapes": shapes, "dtype": torch.bfloat16, "seed": k}
        make(root / "round", Spec(name, rank=rank, samples=100 - k, alpha=2 * rank, **made))
    aggregate = _seconds("aggregate", str(root / "round"), "-o", str(root / "global"))
    diagnose = _seconds("diagnose", str(root / "round"))

    updates = [torch.randn(size, size) for _ in range(modules)]
    began = time.perf_counter()
    for update in updates:
        torch.linalg.svd(update, full_matrices=False)
    return Timing(aggregate, diagnose, time.perf_counter() - began)


def _seconds(*arguments: str) -> float:
    """What a command takes, from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fedlora_cli", *arguments, "--quiet"], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a module")
    parser.add_argument("--modules", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        timing = measure(Path(place), chosen.size, chosen.modules)
    for name in ("aggregate", "diagnose"):
        seconds = getattr(timing, name)
        print(f"{name:10} {seconds:6.2f} s, dense SVDs {timing.dense / seconds:6.1f} times that")
    print(f"dense SVDs {timing.dense:6.2f} s")


if __name__ == "__main__":
    main()
