"""Tensors of safetensors files: described by the header, read later in few ranges."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.files.untrusted import State, opened
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor

#: Longest range, in bytes, that is read for several tensors at once.
_MAX_RANGE = 64 * 1024 * 1024

#: For each dtype in a file: its name in torch, and bytes per number.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file, not yet read. `dtype` is its name in torch."""

    path: Location
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    length: int  # bytes
    state: State  # of the file when its header was read

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def end(self) -> int:
        return self.start + self.length

    def part(self, first: int, count: int) -> TensorInfo:
        """Rows `first` to `first + count` of the first dimension, as a tensor of their own.

        Raises ValueError for rows outside the tensor.

        >>> from pathlib import Path
        >>> whole = TensorInfo(Path("x"), "A", "float32", (4, 8), 100, 128, State(228, 0, 0))
        >>> rows = whole.part(1, 2)
        >>> rows.key, rows.shape, rows.start, rows.length
        ('A[1:3]', (2, 8), 132, 64)
        """
        if not self.shape or count < 1 or first < 0 or first + count > self.shape[0]:
            raise ValueError(f"rows {first} to {first + count} of a tensor of shape {self.shape}")
        row = self.length // self.shape[0]
        return replace(
            self,
            key=f"{self.key}[{first}:{first + count}]",
            shape=(count, *self.shape[1:]),
            start=self.start + first * row,
            length=count * row,
        )

    def read(self, on_fault: FaultHandler = raise_fault) -> Tensor:
        """Read the tensor. NaN and infinite values go to `on_fault`. Raises InputError."""
        [tensor] = read_entries([self], on_fault)
        return tensor


def read_entries(
    entries: Sequence[TensorInfo], on_fault: FaultHandler = raise_fault
) -> list[Tensor]:
    """Read tensors, adjacent ones in a single range, and each only once.

    Tensors of the same range share its memory. NaN and infinite values go to `on_fault`. Raises
    InputError.
    """
    tensors: dict[TensorInfo, Tensor] = {}
    in_order = sorted(set(entries), key=lambda entry: (str(entry.path), entry.start, entry.end))
    for path, group in groupby(in_order, key=lambda entry: entry.path):
        of_file = list(group)
        with opened(path, of_file[0].state) as file:
            for adjacent in _ranges(of_file):
                first, last = adjacent[0].start, max(entry.end for entry in adjacent)
                _check_memory(adjacent[0], last - first)
                buffer = bytearray(last - first)
                file.fill(first, buffer)
                for entry in adjacent:
                    tensors[entry] = _tensor(entry, buffer, entry.start - first)
    for entry in dict.fromkeys(entries):
        _check_finite(entry, tensors[entry], on_fault)
    return [tensors[entry] for entry in entries]


def _ranges(entries: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Groups of entries without gaps between them. `entries` are of one file, in order of bytes."""
    adjacent: list[TensorInfo] = []
    end = 0  # of the group; not computed anew, because a file may have 100 000 tensors
    for entry in entries:
        end_with = max(entry.end, end)
        if adjacent and (entry.start > end or end_with - adjacent[0].start > _MAX_RANGE):
            yield adjacent
            adjacent = []
        end = end_with if adjacent else entry.end
        adjacent.append(entry)
    if adjacent:
        yield adjacent


def _tensor(entry: TensorInfo, buffer: bytearray, offset: int) -> Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, entry.dtype)
    count = entry.length // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(entry.shape)


def _check_finite(entry: TensorInfo, tensor: Tensor, on_fault: FaultHandler) -> None:
    """Report NaN and infinite values to `on_fault`.

    The sum is tested first: it takes a twentieth of the time of testing each value (0.3 ms against
    6 ms for 2.5 million values in bfloat16 on one core).
    """
    import torch

    if not entry.is_float or bool(torch.isfinite(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor.flatten())
    if not bool(bad.any()):  # only the sum overflows
        return
    found = f"{entry.key} holds {int(bad.sum())} NaN or infinite values, "
    found += f"the first at position {int(bad.nonzero()[0])}"
    cure = "leave this client out; its training has diverged"
    on_fault(InputError(entry.path, found, cure))


def _check_memory(entry: TensorInfo, length: int) -> None:
    if length > _memory():
        found = f"{entry.key} has {length} bytes, more than there is memory"
        raise InputError(entry.path, found, "check what this file is")


def _memory() -> int:
    """The physical memory in bytes. Allocating more succeeds, and then kills the process."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
