"""Whole processes, measured from outside, by the operating system's account of each.

This process must stay small: Linux counts the memory of who starts a process as that process's own
peak until it has more, so that nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: Bytes that are read at a time: they stay in the processor's cache.
_BLOCK = 2**20


@dataclass(frozen=True)
class Usage:
    """Seconds on the clock, seconds of all cores together, and the most bytes of memory."""

    wall: float
    cpu: float
    peak: int


def cores() -> int:
    """The processor cores that this process, and so its children, may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measured(command: Sequence[str]) -> Usage:
    """What a command takes from its start to its end. Raises CalledProcessError."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    kibibytes = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss // 1024
    return Usage(wall, usage.ru_utime + usage.ru_stime, kibibytes * 1024)


def fedlora(*arguments: str | Path) -> Usage:
    """What a fedlora command takes: the start of Python, the import of torch, and the work."""
    command = [sys.executable, "-m", "fedlora_cli", *map(str, arguments), "--quiet"]
    return measured(command)


def script(name: str, *arguments: str | Path | int) -> str:
    """What one of the scripts beside this one prints."""
    command = [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]
    # Threads that wait for another one must not count as working.
    waiting = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command, cwd=ROOT, env=waiting, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def contenders(
    cohort: Path,
    modules: Iterable[str],
    names: Sequence[str],
    threads: int,
    repeat: int,
    *,
    rank: int = 64,
    clients: int = 0,
    of: Callable[[list[float]], float] = median,
) -> dict[str, dict[str, float]]:
    """Seconds by module and contender, timed in turn in one process; `of` those of its repeats."""
    chosen = [option for module in modules for option in ("--module", module)]
    numbers = ("--threads", threads, "--repeat", repeat, "--rank", rank, "--clients", clients)
    found: dict[str, Any] = json.loads(script("contenders", cohort, *names, *chosen, *numbers))
    return {
        module: {name: of(seconds) for name, seconds in times.items()}
        for module, times in found.items()
    }


def read_seconds(cohort: Path) -> float:
    """Seconds to read every byte of the weights once, by all cores, and to do nothing with them."""
    files = sorted(cohort.glob("*/adapter_model.safetensors"))
    began = time.perf_counter()
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(_read, files))
    return time.perf_counter() - began


def _read(path: Path) -> None:
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def weight_bytes(cohort: Path) -> int:
    """The bytes of all weights files."""
    return sum(path.stat().st_size for path in cohort.glob("*/adapter_model.safetensors"))


def machine() -> dict[str, Any]:
    """What it was measured on."""
    from importlib.metadata import version

    return {
        "processor": _processor(),
        "cores": cores(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("fedlora", "torch", "peft")},
    }


def _processor() -> str:
    """The processor's name, where the system tells."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
