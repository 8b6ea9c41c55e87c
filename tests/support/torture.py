"""Runs of `fedlora aggregate` over one output that are ended by signals, or race; what they leave.

It forks, so it is a process of its own:
`PYTHONPATH=tests python -m support.torture FOLDER SEED KILLS STOPS RACES` prints a JSON document.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedlora_cli import formats
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.cli import main
from fedlora_cli.rounds.aggregate import aggregate
from support.adapters import Spec, make

SHAPES = {f"layers.{i}.fc": (160, 200) for i in range(4)}
#: Two rounds of which nothing can be mixed up: other clients, other ranks.
RANKS = {"odd": (3, 9), "even": (4, 6)}

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "fedlora.json"}


def generation(out: Path) -> str:
    """The round that an adapter is of. Raises AssertionError where its files are not of one."""
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads((out / "fedlora.json").read_text())
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}
    del found["fedlora.json"]
    assert report["files"] == found
    rank = json.loads((out / "adapter_config.json").read_text())["r"]
    assert rank == report["rank"]
    adapter = formats.read(out)
    assert {name: module.read().rank for name, module in adapter.modules.items()} == (
        dict.fromkeys(SHAPES, rank)
    )
    return next(name for name, ranks in RANKS.items() if max(ranks) == rank)


def begin(root: Path, name: str, at: Callable[[], object] = lambda: None) -> int:
    """The process of the command on that round; `at` is what it waits for."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        at()
        out = str(root / "out")
        sys.argv = ["fedlora", "aggregate", str(root / name), "-o", out, "--force", "--jobs", "1"]
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 70
    except SystemExit as late:  # asked to stop when all was done
        code = late.code if isinstance(late.code, int) else 70
    finally:
        os._exit(code)


def end(process: int) -> int:
    """Its exit code, or the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left(root: Path) -> set[str]:
    """What is there beside the rounds and the adapter."""
    return {path.name for path in root.iterdir()} - {*RANKS, "out"}


def wait_for_writing(process: int, root: Path, before: set[str]) -> None:
    """Until its temporary folder is there, which was not `before`, or it has ended already."""
    ask = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not any(".tmp-" in name for name in left(root) - before):
        if os.waitid(os.P_PID, process, ask) is not None:
            return


def durations(root: Path) -> tuple[float, float]:
    """Seconds of a whole run, and of its end, from the temporary folder on."""
    whole, writing = [], []
    for name in (*RANKS, *RANKS):
        start = time.perf_counter()
        process = begin(root, name)
        wait_for_writing(process, root, set())
        middle = time.perf_counter()
        assert end(process) == 0
        whole.append(time.perf_counter() - start)
        writing.append(time.perf_counter() - middle)
    return statistics.median(whole), statistics.median(writing)


def ended(root: Path, number: int, by: signal.Signals, chance: random.Random) -> dict[str, Any]:
    """`number` runs over an existing adapter, each ended somewhere on its way: every second one
    anywhere, the others while they write. Those that were faster are not counted among them.
    """
    whole, writing = durations(root)
    outcomes: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    torn: list[str] = []
    seen: set[str] = set()
    locks = 0
    now = generation(root / "out")
    for run in range(4 * number):
        if codes.total() - codes[0] == number:
            break
        other = next(name for name in RANKS if name != now)
        before = left(root)
        process = begin(root, other)
        if run % 2:
            wait_for_writing(process, root, before)
        time.sleep(chance.uniform(0, writing if run % 2 else whole))
        os.kill(process, by)
        codes[code := end(process)] += 1
        seen |= {name for name in left(root) if ".tmp-" in name}
        locks += ".out.lock" in left(root)
        try:
            after = generation(root / "out")
        except Exception as error:
            torn.append(repr(error))
            break
        published = "after publication" if after != now else "before publication"
        outcomes["finished first" if code == 0 else published] += 1
        now = after
    assert end(begin(root, now)) == 0
    return {
        "seconds": [round(whole, 3), round(writing, 3)],
        "outcomes": outcomes,
        "codes": codes,
        "torn": torn,
        "temporaries": len(seen),
        "locks": locks,
        "unswept": sorted(left(root)),
    }


def raced(root: Path, number: int) -> dict[str, Any]:
    """`number` times two runs at once."""
    codes: Counter[str] = Counter()
    wrong: list[str] = []
    for _ in range(number):
        source, sink = os.pipe()
        wait = partial(os.read, source, 1)
        processes = {name: begin(root, name, wait) for name in RANKS}
        os.write(sink, b"go")
        ends = {name: end(process) for name, process in processes.items()}
        for descriptor in (source, sink):
            os.close(descriptor)
        codes[" ".join(map(str, sorted(ends.values())))] += 1
        winner = generation(root / "out")
        if ends[winner] != 0 or left(root):
            wrong.append(f"{winner} of {ends}, {left(root)}")
    return {"codes": codes, "wrong": wrong}


def torture(root: Path, seed: int, kills: int, stops: int, races: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for name, ranks in RANKS.items():
        for number, rank in enumerate(ranks):
            make(root / name, Spec(f"{name}{number}", rank, shapes=SHAPES))
        # Here, so that nothing is left to import.
        aggregate([root / name], root / "out", AggregateOptions(force=True, jobs=1))
    results = {
        "killed": ended(root, kills, signal.SIGKILL, chance),
        "stopped": ended(root, stops, signal.SIGTERM, chance),
        "raced": raced(root, races),
    }
    for name in RANKS:
        shutil.rmtree(root / name)
    return results


if __name__ == "__main__":
    print(json.dumps(torture(Path(sys.argv[1]), *map(int, sys.argv[2:]))))  # noqa: T201
