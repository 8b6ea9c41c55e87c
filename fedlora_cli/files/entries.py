"""Tensors of safetensors files, known from headers, read in few ranges when they are wanted."""

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

#: The longest range that is read for several tensors at once.
_MAX_RANGE = 64 * 1024 * 1024

#: torch's name and the bytes of one number, for every dtype that adapters hold.
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
    """One tensor of a file that has not been read yet. `dtype` is torch's name for it."""

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
        """Rows first to first + count of the first dimension: one range of the file.

        It is read under the same checks as the whole. Raises ValueError beyond the tensor.

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
        """The tensor; values that are not finite go to `on_fault`. Raises InputError."""
        [tensor] = read_entries([self], on_fault)
        return tensor


def read_entries(
    entries: Sequence[TensorInfo], on_fault: FaultHandler = raise_fault
) -> list[Tensor]:
    """These tensors. What lies side by side in a file is read as one range, and nothing twice.

    Tensors of one range share its memory. Values that are not finite go to `on_fault`. Raises
    InputError.
    """
    found: dict[TensorInfo, Tensor] = {}
    in_order = sorted(set(entries), key=lambda one: (str(one.path), one.start, one.end))
    for path, own in groupby(in_order, key=lambda one: one.path):
        of_file = list(own)
        with opened(path, of_file[0].state) as file:
            for together in _ranges(of_file):
                first, last = together[0].start, max(one.end for one in together)
                _check_memory(together[0], last - first)
                buffer = bytearray(last - first)
                file.fill(first, buffer)
                found |= {one: _tensor(one, buffer, one.start - first) for one in together}
    for one in dict.fromkeys(entries):
        _check_finite(one, found[one], on_fault)
    return [found[one] for one in entries]


def _ranges(entries: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Entries of one file in the order of their bytes, those together that have no gap between."""
    together: list[TensorInfo] = []
    end = 0  # of all in it: kept, as a file may have a hundred thousand tensors
    for one in entries:
        if together and (one.start > end or max(one.end, end) - together[0].start > _MAX_RANGE):
            yield together
            together = []
        end = max(one.end, end) if together else one.end
        together.append(one)
    if together:
        yield together


def _tensor(entry: TensorInfo, buffer: bytearray, offset: int) -> Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, entry.dtype)
    count = entry.length // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(entry.shape)


def _check_finite(entry: TensorInfo, tensor: Tensor, on_fault: FaultHandler) -> None:
    """Whether all values are finite.

    Their sum is not where one of them is not, and takes a twentieth of the time to look at each
    (0.3 against 6 ms for 2.5 million in bfloat16, one core).
    """
    import torch

    if not entry.is_float or bool(torch.isfinite(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor.flatten())
    if not bool(bad.any()):  # only their sum is too large
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
    """The memory of this machine in bytes, where it tells.

    The system promises more than it has, and kills who takes it at its word.
    """
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
