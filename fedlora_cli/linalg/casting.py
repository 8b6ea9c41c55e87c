"""Factors as a file holds them: in one dtype, at one rank, ready to be trained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from fedlora_cli.errors import NotFinite
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors


def cast(factors: Factors, dtype: str, name: str) -> Factors:
    """The factors of a module in a dtype; to leave its range is an error, never an infinity or 0.

    Raises InputError.
    """
    target = getattr(torch, dtype)
    cast = Factors(factors.B.to(target), factors.A.to(target), factors.scale)
    moved = Factors(cast.B.double() - factors.B, cast.A.double() - factors.A)
    # By the pieces b_i a_i: a large column of B must not hide one that vanished.
    B, A = torch.linalg.vector_norm(factors.B, dim=0), torch.linalg.vector_norm(factors.A, dim=1)
    dB, dA = torch.linalg.vector_norm(moved.B, dim=0), torch.linalg.vector_norm(moved.A, dim=1)
    # Not `>`: an overflow is an infinite error, or none that can be compared.
    if not (dB * A + B * dA).sum() <= 2 * torch.finfo(target).eps * (B * A).sum():
        found = f"its factors leave the range of {dtype}"
        raise NotFinite(name, found, "give a wider --dtype, such as float32")
    return cast


def at_rank(factors: Factors, rank: int, name: str) -> Factors:
    """Exactly that rank, on the CPU: the first directions, or padded so that they can train.

    The rows that pad A depend on the name of the module alone.
    """
    cut = Factors(factors.B[:, :rank].cpu(), factors.A[:rank].cpu(), factors.scale)
    return lowrank.pad(cut, rank, seed=seed_of(name))


def described(shape: tuple[int, int], rank: int, dtype: str) -> Factors:
    """Factors of a module on torch's meta device, which has no values."""
    kind = getattr(torch, dtype)
    return Factors(
        B=torch.empty(shape[0], rank, dtype=kind, device="meta"),
        A=torch.empty(rank, shape[1], dtype=kind, device="meta"),
    )


def stored_bytes(shape: Sequence[int], dtype: str) -> int:
    """What a tensor takes in a file.

    >>> stored_bytes((16, 64), "bfloat16")
    2048
    """
    size: int = getattr(torch, dtype).itemsize
    return math.prod(shape) * size


def seed_of(name: str, seed: int = 0) -> int:
    """A seed for one module that depends on its name, not on the order of work."""
    text = f"{seed} {name}" if seed else name
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
