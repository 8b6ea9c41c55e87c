"""Bad input: one line saying where, what was found and what to do; exit 3; nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.rows import Row
from support.adapters import Spec, make
from support.cli import run
from support.corpus import CORPUS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two clients, `good` and `bad`, with nothing wrong yet."""
    folder = tmp_path_factory.mktemp("whole") / "round"
    for name in ("good", "bad"):
        make(folder, Spec(name, rank=3, samples=10))
    return folder


def damaged(whole: Path, place: Path, fault: str) -> Path:
    """A copy of the two clients, one of them spoilt."""
    shutil.copytree(whole, place)
    CORPUS[fault][0](place / "bad")
    return place


@pytest.mark.parametrize("fault", CORPUS)
def test_a_bad_client_is_refused_in_one_line(tmp_path: Path, whole: Path, fault: str) -> None:
    clients = damaged(whole, tmp_path / "round", fault)
    before = sorted(tmp_path.iterdir())

    arguments = ["aggregate", str(clients), "-o", str(tmp_path / "out")]
    result = run(*arguments)

    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "bad" in lines[0]
    assert "; " in lines[0]
    assert CORPUS[fault][1] in lines[0]
    assert lines[0].isprintable()
    assert len(lines[0]) < 2000
    assert sorted(tmp_path.iterdir()) == before


#: What the reading of one damaged round should take, where no expression is stopped at its limit,
#: and the memory that it takes at most.
SECONDS, MIB = 1.0, 50
ENDLESS = "config: an expression that takes every matcher for ever"

#: Reads every folder on standard input, and tells what each cost beyond what stood before.
MEASURE = """
import json, sys, time
from pathlib import Path
from fedlora_cli.clients.reading import read_clients
from fedlora_cli.errors import InputError

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

for line in sys.stdin:
    folder = Path(json.loads(line))
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.process_time()
    try:
        read_clients([folder])
        refused = False
    except InputError:
        refused = True
    print(json.dumps([refused, time.process_time() - began, peak() - before]))
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process cost is asked of /proc")
def test_a_refusal_is_cheap_and_does_not_even_load_torch(
    tmp_path: Path, whole: Path, tell: Callable[[Row], None]
) -> None:
    """In one process of its own: a child begins with the peak of the memory of its parent."""
    places = [str(damaged(whole, tmp_path / f"{i}/round", case)) for i, case in enumerate(CORPUS)]

    lines = "".join(f"{json.dumps(place)}\n" for place in places)
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    costs = dict(zip(CORPUS, map(json.loads, done.stdout.splitlines()), strict=True))
    for fault, (refused, _, memory) in costs.items():
        assert refused == (not fault.startswith("values: ")), fault
        assert memory < MIB, (fault, memory)
    times = {fault: seconds for fault, (_, seconds, _) in costs.items()}
    limited = times.pop(ENDLESS)
    slowest = max(times, key=times.__getitem__)
    for fault, taken, most in ((slowest, times[slowest], SECONDS), (ENDLESS, limited, 3 * SECONDS)):
        tell(Row("refusal", fault, "processor", taken, "a bar", most, at_most=1.0))
