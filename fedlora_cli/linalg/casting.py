"""Factors as a file holds them: of the output's dtype and rank, ready for training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from fedlora_cli.errors import NotFinite
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors


def cast(factors: Factors, dtype: str, name: str) -> Factors:
    """The factors of the module `name` in a dtype.

    Raises InputError if a value leaves the range of the dtype, instead of an infinity or 0.
    """
    target = getattr(torch, dtype)
    cast = Factors(factors.B.to(target), factors.A.to(target), factors.scale)
    moved = Factors(cast.B.double() - factors.B, cast.A.double() - factors.A)
    # Compared by rank-one pieces b_i a_i, so that a large column of B does not hide a lost one.
    B, A = torch.linalg.vector_norm(factors.B, dim=0), torch.linalg.vector_norm(factors.A, dim=1)
    dB, dA = torch.linalg.vector_norm(moved.B, dim=0), torch.linalg.vector_norm(moved.A, dim=1)
    # `not <=` is also true for NaN, which an overflow may give.
    if not (dB * A + B * dA).sum() <= 2 * torch.finfo(target).eps * (B * A).sum():
        found = f"its factors leave the range of {dtype}"
        raise NotFinite(name, found, "give a wider --dtype, such as float32")
    return cast


def at_rank(factors: Factors, rank: int, name: str) -> Factors:
    """The factors at that rank, on the CPU: cut, or padded by the module's name so that all indices
    can train.
    """
    cut = Factors(factors.B[:, :rank].cpu(), factors.A[:rank].cpu(), factors.scale)
    return lowrank.pad(cut, rank, seed=seed_of(name))


def described(shape: tuple[int, int], rank: int, dtype: str) -> Factors:
    """Factors without values, on torch's meta device."""
    kind = getattr(torch, dtype)
    return Factors(
        B=torch.empty(shape[0], rank, dtype=kind, device="meta"),
        A=torch.empty(rank, shape[1], dtype=kind, device="meta"),
    )


def stored_bytes(shape: Sequence[int], dtype: str) -> int:
    """The bytes of a tensor in a file.

    >>> stored_bytes((16, 64), "bfloat16")
    2048
    """
    size: int = getattr(torch, dtype).itemsize
    return math.prod(shape) * size


def seed_of(name: str, seed: int = 0) -> int:
    """A seed that depends on the name of a module, not on the order of work."""
    text = f"{seed} {name}" if seed else name
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
