"""The whole command against dense SVDs of the same modules, on the same machine, in one run.

Twelve clients of ranks 8 to 64, four square modules in bfloat16. The command is timed from outside:
Python's start, the import of torch, reading, aggregating, writing. The dense SVDs are what a
server pays that forms every update and decomposes it (torch, float32, all cores), and nothing else.

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
    """Seconds of the whole command, and of the dense SVDs alone."""

    command: float
    dense: float

    @property
    def ratio(self) -> float:
        return self.dense / self.command


def measure(root: Path, size: int, modules: int) -> Timing:
    """Make a round in `root` and time both."""
    shapes = {f"layers.{i}.proj": (size, size) for i in range(modules)}
    for k, rank in enumerate(RANKS):
        name = f"client-{k:02}"
        made = {"shapes": shapes, "dtype": torch.bfloat16, "seed": k}
        make(root / "round", Spec(name, rank=rank, samples=100 - k, alpha=2 * rank, **made))
    command = [sys.executable, "-m", "fedlora_cli", "aggregate", str(root / "round"), "--quiet"]
    began = time.perf_counter()
    subprocess.run([*command, "-o", str(root / "global")], check=True)
    took = time.perf_counter() - began

    updates = [torch.randn(size, size) for _ in range(modules)]
    began = time.perf_counter()
    for update in updates:
        torch.linalg.svd(update, full_matrices=False)
    return Timing(took, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a module")
    parser.add_argument("--modules", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        timing = measure(Path(place), chosen.size, chosen.modules)
    print(f"whole command {timing.command:6.2f} s")
    print(f"dense SVDs    {timing.dense:6.2f} s")
    print(f"ratio         {timing.ratio:6.1f}")


if __name__ == "__main__":
    main()
