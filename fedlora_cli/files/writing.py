"""Safetensors files, written tensor by tensor into their places, with reproducible bytes.

The library writes a file from tensors that are all in memory, and its metadata in random order; an
aggregation has one module at a time. The layout is the library's, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.errors import OutputError
from fedlora_cli.files.entries import DTYPES
from fedlora_cli.files.safetensors import unreadable_header

if TYPE_CHECKING:
    from torch import Tensor

#: Takes a tensor by its name. Raises OSError.
Put = Callable[[str, "Tensor"], None]

#: The order of dtypes in a file: the library's, by alignment.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8")

#: The header ends where a tensor of any dtype may begin.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Declared:
    """A tensor that a file will hold. `dtype` is torch's name for it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def code(self) -> str:
        """What the format calls the dtype."""
        return next(code for code, (name, _) in DTYPES.items() if name == self.dtype)

    @property
    def length(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * DTYPES[self.code][1]


@contextmanager
def writing(
    path: Path, declared: Mapping[str, Declared], metadata: Mapping[str, str]
) -> Iterator[Put]:
    """A new file that takes the declared tensors in any order; all of them, when the block ends.

    Its bytes depend on nothing but the tensors and the arguments. Raises OSError, and OutputError
    as `check_header` does.
    """
    header, places = _header(declared, metadata)
    missing = set(declared)
    with path.open("xb") as file:
        file.write(header)

        def put(name: str, tensor: Tensor) -> None:
            one = declared[name]
            if (str(tensor.dtype), tensor.shape) != (f"torch.{one.dtype}", one.shape):
                raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {one}")
            missing.remove(name)
            file.seek(places[name])
            file.write(_bytes(tensor))

        yield put
        if missing:
            raise AssertionError(f"{sorted(missing)} were declared and not written")


def check_header(declared: Mapping[str, Declared], metadata: Mapping[str, str]) -> None:
    """Whether a file with these tensors can be read again by what reads the files of others.

    Raises OutputError.
    """
    _header(declared, metadata)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A new file with these tensors. Raises OSError."""
    with writing(path, {name: declare(one) for name, one in tensors.items()}, metadata) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


def declare(tensor: Tensor) -> Declared:
    """What a tensor is; it may be on the meta device, which has no values."""
    return Declared(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _header(
    declared: Mapping[str, Declared], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, and where in it every tensor begins.

    Raises OutputError where no reader would take them.
    """
    ordered = sorted(declared, key=lambda name: (_ORDER.index(declared[name].code), name))
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    position = 0
    for name in ordered:
        one = declared[name]
        starts[name] = position
        offsets = [position, position + one.length]
        position = offsets[1]
        fields[name] = {"dtype": one.code, "shape": list(one.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT)
    excess = unreadable_header(text, len(declared))
    if excess is not None:
        raise OutputError("the weights file", f"it would have {excess}", "adapt fewer modules")
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + at for name, at in starts.items()}


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as files hold them, without a copy where it is contiguous."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    content: Any = flat.view(torch.uint8).numpy()
    return memoryview(content)
