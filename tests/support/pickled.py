"""Functions for other processes to run: what is pickled must stand in a module."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch

from fedlora_cli.aggregation.module import aggregate_part
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.errors import FedloraError, InputError
from fedlora_cli.files.untrusted import opened


def square(n: int) -> int:
    return n * n


def decomposed(seed: int) -> str:
    """Of a matrix whose QR LAPACK splits over the cores that it believes to have."""
    matrix = torch.randn(
        333, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return hashlib.sha256(torch.linalg.qr(matrix)[0].numpy().tobytes()).hexdigest()


def tensors(dtype: str) -> dict[str, torch.Tensor]:
    """Values of every kind, a view of a large tensor among them."""
    target = getattr(torch, dtype)
    large = torch.arange(-50_000, 50_000).to(target).reshape(100, 1000)
    extreme = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 1e-40])
    return {
        "view": large[:, ::250],
        "turned": large[:3, :5].T,
        "empty": torch.empty(0, 7, dtype=target),
        "scalar": large[0, 0],
        "extreme": extreme.to(target) if target.is_floating_point else extreme[:2].to(target),
    }


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def part_digest(part: tuple[Plan, Sequence[str]]) -> str:
    """One SHA-256 over all that comes of a part of a plan."""
    total = hashlib.sha256()
    for factors, outcome in aggregate_part(part):
        for tensor in (factors.B, factors.A):
            total.update(repr(bits(tensor)).encode())
        for array in (outcome.s, outcome.flexlora_s, outcome.weights, *outcome.client_s.values()):
            total.update(array.tobytes())
    return total.hexdigest()


def refused(error: FedloraError) -> None:
    raise error


def broken(n: int) -> int:
    if n == 3:
        raise ValueError("three")
    return n


def read_whole(path: Path) -> bytes:
    with opened(path) as file:
        return b"".join(file.blocks())


def absent(name: str) -> None:
    raise InputError(Path("no/such") / name, "cannot be read (no such file)", "check the path")


def killed_once(mark: Path) -> str:
    """Ends the process that runs it for the first time."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return decomposed(7)


def killed(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cores(_: object) -> int:
    return torch.get_num_threads()


def process(_: object) -> int:
    return os.getpid()


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
