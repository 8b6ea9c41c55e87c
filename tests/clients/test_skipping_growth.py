"""What `--on-bad-client skip` does grows with the clients at fault, not with their square.

Calls of functions are counted, which no clock and no other process changes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.adapters import Spec, make

from fedlora_cli.clients.skipping import select_clients


def damage(folder: Path, field: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))


def copy(good: Path, bad: Path) -> Path:
    return Path(shutil.copytree(good, bad))


#: What is wrong with a client in the folder `bad`, beside one in `good`.
FAULTS: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda good, bad: None,
    "empty": lambda good, bad: bad.mkdir(),
    "a broken link": lambda good, bad: bad.symlink_to(good / "nothing"),
    "named twice": lambda good, bad: bad.symlink_to(good),
    "damaged": lambda good, bad: (copy(good, bad) / "adapter_config.json").write_text("{"),
    "without a count": lambda good, bad: (copy(good, bad) / "fedlora.json").unlink(),
    "misfit": lambda good, bad: damage(copy(good, bad), "use_dora", True),
}


def calls_of(root: Path, fault: str, number: int, *, together: bool) -> int:
    """The calls of Python functions for so many clients at fault, and one more that are not."""
    folder = root / f"{number}"
    paths = [make(folder, Spec("g0000", 2, samples=10)).folder]
    paths += [copy(paths[0], folder / f"g{one:04}") for one in range(1, number + 2)]
    paths += [folder / f"x{one:04}" for one in range(number)]
    for good, bad in zip(paths, paths[number + 2 :], strict=False):
        FAULTS[fault](good, bad)
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        found = select_clients([folder] if together else paths)
    finally:
        sys.setprofile(None)
    assert len(found.left_out) == number
    assert len(found.cohort.clients) == number + 2
    return count


@pytest.mark.parametrize(
    ("fault", "together"),
    [
        *((fault, False) for fault in FAULTS),
        *((fault, True) for fault in FAULTS if fault not in ("missing", "empty")),
    ],
)
def test_clients_at_fault_cost_the_same_each(tmp_path: Path, fault: str, together: bool) -> None:
    few, some, many = (calls_of(tmp_path, fault, n, together=together) for n in (10, 20, 60))

    assert (many - some) / 40 < 1.15 * (some - few) / 10
