"""One digest for the same inputs: whatever the order, the jobs, the threads and the hash seed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.digest import OPTIONS, SPECS, digest
from support.rounds import make_round

from fedlora_cli import aggregate

SCRIPT = """
import sys
from pathlib import Path
from support.digest import OPTIONS, digest
from fedlora_cli import aggregate
aggregate(sorted(Path(sys.argv[1]).iterdir()), sys.argv[2], OPTIONS)
print(digest(Path(sys.argv[2])))
"""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_one_digest_for_all(tmp_path: Path) -> None:
    folders = [one.folder for one in make_round(tmp_path, SPECS)]
    orders = [folders, folders[::-1], folders[2:] + folders[:2]]
    found = set()
    for number, (own, jobs, order) in enumerate(itertools.product((1, 2, 4), (1, 2), orders)):
        torch.set_num_threads(own)
        out = tmp_path / f"out-{number}"
        aggregate(order, out, replace(OPTIONS, jobs=jobs))
        found.add(digest(out))
    for seed in ("0", "1"):
        out = tmp_path / f"out-seed-{seed}"
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "round"), str(out)]
        path = str(Path(__file__).parents[1])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        found.add(done.stdout.strip())

    assert len(found) == 1
