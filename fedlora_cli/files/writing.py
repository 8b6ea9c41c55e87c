"""Safetensors files written tensor by tensor, with reproducible bytes.

The safetensors library needs all tensors in memory and writes metadata in random order. An
aggregation has one module in memory at a time. The layout equals the library's, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from fedlora_cli.errors import OutputError
from fedlora_cli.files.entries import DTYPES
from fedlora_cli.files.safetensors import unreadable_header
from fedlora_cli.remote import Location, Remote

if TYPE_CHECKING:
    from torch import Tensor

#: Writes the tensor of that name. Raises OSError.
Put = Callable[[str, "Tensor"], None]

#: The library's order of dtypes in a file, by alignment.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8")

#: The header is padded to a multiple of this, so that tensors of any dtype are aligned.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Declared:
    """A tensor to be written. `dtype` is its name in torch."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def code(self) -> str:
        """The name of the dtype in the file format."""
        return next(code for code, (name, _) in DTYPES.items() if name == self.dtype)

    @property
    def length(self) -> int:
        """The length in bytes."""
        return math.prod(self.shape) * DTYPES[self.code][1]


def new_file(path: Location) -> AbstractContextManager[IO[bytes]]:
    """A new file, for a block to write. Raises OSError."""
    return path.create() if isinstance(path, Remote) else path.open("xb")


def write_text(path: Location, text: str) -> None:
    """Write a new file of UTF-8. Raises OSError."""
    with new_file(path) as file:
        file.write(text.encode())


@contextmanager
def writing(
    path: Location, declared: Mapping[str, Declared], metadata: Mapping[str, str]
) -> Iterator[Put]:
    """Create a file; the block writes all declared tensors to it, in any order.

    The bytes depend only on the tensors and the arguments. Raises OSError, and OutputError as
    `check_header` does.
    """
    header, places = layout_of(declared, metadata)
    missing = set(declared)
    with new_file(path) as file:
        file.write(header)

        def put(name: str, tensor: Tensor) -> None:
            expected = declared[name]
            if (str(tensor.dtype), tensor.shape) != (f"torch.{expected.dtype}", expected.shape):
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise AssertionError(f"{name} is {found}, not {expected}")
            missing.remove(name)
            file.seek(places[name])
            file.write(stored(tensor))

        yield put
        if missing:
            raise AssertionError(f"{sorted(missing)} were declared and not written")


def check_header(declared: Mapping[str, Declared], metadata: Mapping[str, str]) -> None:
    """Raise OutputError if `read_header` would refuse a file with these tensors."""
    layout_of(declared, metadata)


def write(path: Location, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file with these tensors. Raises OSError."""
    with writing(path, {name: declare(t) for name, t in tensors.items()}, metadata) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


def declare(tensor: Tensor) -> Declared:
    """The declaration of a tensor, which may be on the meta device."""
    return Declared(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def layout_of(
    declared: Mapping[str, Declared], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and the position of each tensor in the file. Raises OutputError."""
    ordered = sorted(declared, key=lambda name: (_ORDER.index(declared[name].code), name))
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    position = 0
    for name in ordered:
        tensor = declared[name]
        starts[name] = position
        offsets = [position, position + tensor.length]
        position = offsets[1]
        fields[name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT)
    excess = unreadable_header(text, len(declared))
    if excess is not None:
        raise OutputError("the weights file", f"it would have {excess}", "adapt fewer modules")
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + at for name, at in starts.items()}


def stored(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as files hold them, without a copy if it is contiguous."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    content: Any = flat.view(torch.uint8).numpy()
    return memoryview(content)
