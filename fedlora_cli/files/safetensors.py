"""Headers of safetensors files, parsed more strictly than the library does.

Duplicate keys, gaps, overlaps, wrong sizes and unprintable names are refused before any tensor is
read. Reading a tensor fails if its file has changed since the header was read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fedlora_cli.errors import FaultHandler, InputError, catching_faults, raise_fault
from fedlora_cli.files.documents import parse_object
from fedlora_cli.files.entries import DTYPES, TensorInfo
from fedlora_cli.files.untrusted import MAX_FILE_BYTES, State, opened
from fedlora_cli.remote import Location

#: Bytes. The header of 50 000 modules with long names (mixtures of experts) takes 16 MB, their
#: magnitudes or biases 8 MB, and metadata some more.
MAX_HEADER_BYTES = 32 * 1024 * 1024

#: Two factors, and a magnitude or bias, for each of 50 000 modules.
MAX_TENSORS = 150_000

#: Most of each of these marks in the description of one tensor, outside of strings. JSON of marks
#: alone takes 30 times its length in memory. Strings take their length only, and may be long: some
#: trainers store a description of the whole data set in the metadata.
_MARKS = {b"[": 2, b":": 4, b",": 8}
#: Most quotation marks in the description of one tensor: five strings.
_QUOTES = 10

#: Longest dimension of a tensor, 16 times the largest vocabularies, and most dimensions: a 3D
#: convolution has five.
MAX_SIDE = 2**24
MAX_SIDES = 5

#: Remedy for a tensor that holds the share of a single process.
GATHER = "gather the shards (ZeRO-3, FSDP) before save_pretrained"

_METADATA = "__metadata__"
_NAME = re.compile(r"[A-Za-z0-9_.:+-]{1,512}")


def read_header(path: Location, on_fault: FaultHandler = raise_fault) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file declares, sorted by name. Reads no tensor.

    Raises InputError unless the file is complete, regular, and exactly as its header describes.
    Faults of single tensors go to `on_fault`; these tensors are left out.
    """
    return read_contents(path, on_fault)[0]


def read_contents(
    path: Location, on_fault: FaultHandler = raise_fault
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The results of `read_header` and `read_metadata` from reading the header once."""
    header = _header(path)
    entries = {key: header.fields[key] for key in sorted(header.fields) if key != _METADATA}
    if len(entries) > MAX_TENSORS:
        raise _too_many(path)
    result = {}
    for key, value in entries.items():
        with catching_faults(on_fault):
            result[key] = _entry(path, key, value, header.data, header.state)
    whole = len(result) == len(entries)
    _check_tiling(path, list(result.values()), header.data, header.state.size, holes=not whole)
    return result, header.fields.get(_METADATA, {})


def read_metadata(path: Location) -> dict[str, str]:
    """The metadata in the header: text by key. Raises InputError."""
    metadata: dict[str, str] = _header(path).fields.get(_METADATA, {})
    return metadata


@dataclass(frozen=True)
class _Header:
    """A parsed header. `data` is the position of the first tensor byte."""

    fields: dict[str, Any]
    data: int
    state: State


def _header(path: Location) -> _Header:
    """Read and parse the header. Raises InputError."""
    with opened(path) as file:
        size = file.state.size
        prefix = file.read(0, min(8, size))
        length = int.from_bytes(prefix, "little")
        header = file.read(8, length) if length <= min(MAX_HEADER_BYTES, size - 8) else b""
    if len(prefix) < 8:
        raise InputError(path, f"only {size} bytes long", "upload it again; it is not complete")
    if length > size - 8:
        if prefix[:4] == b"PK\x03\x04" or prefix[:1] == b"\x80":
            cure = "save it with safe_serialization=True"
            raise InputError(path, "a pickle, not safetensors", cure)
        if prefix == b"version ":
            raise InputError(path, "a Git LFS pointer, not the file", "run git lfs pull")
        if prefix[:1] == b"<":
            raise InputError(path, "a web page, not safetensors", "download the file itself")
        raise InputError(
            path,
            f"a header of {length} bytes in a file of {size}",
            "upload it again; it is truncated or not safetensors",
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            path,
            f"a header of {length} bytes, more than {MAX_HEADER_BYTES}",
            "save it again, with less metadata",
        )
    if header.endswith(b"\0"):
        found = "a header that is padded with NUL bytes"
        raise InputError(path, found, "save it again with safetensors, which pads with spaces")
    if not header.startswith(b"{"):
        raise InputError(path, "a header that is not JSON", "save it again with safetensors")
    if _describes_too_many(header):
        raise _too_many(path)
    fields = parse_object(header.rstrip(b" "), where=path, whole=_whole)
    metadata = fields.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found = f"{_METADATA} is not text to text"
        raise InputError(path, found, "save it again with safetensors")
    return _Header(fields, 8 + length, file.state)


def _whole(digits: str) -> float:
    """An integer as the safetensors library reads it: -0 becomes a float, which is refused later.

    >>> _whole("12"), _whole("-0")
    (12, -0.0)
    """
    return float(digits) if digits == "-0" else int(digits)


def _without_text(header: bytes) -> bytes:
    r"""JSON without its strings; unchanged if there are more quotation marks than allowed.

    >>> _without_text(rb'{"a": "[:,\"", "b": 1}')
    b'{: , : 1}'
    """
    plain = header.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > _QUOTES * MAX_TENSORS:
        return header
    return b"".join(plain.split(b'"')[::2])


def unreadable_header(header: bytes, tensors: int) -> str | None:
    """The reason why `read_header` would refuse a file of this size, or None.

    Writers check this before they compute a tensor.
    """
    if len(header) > MAX_HEADER_BYTES:
        return f"a header of {len(header)} bytes, more than {MAX_HEADER_BYTES}"
    if tensors > MAX_TENSORS or _describes_too_many(header):
        return f"{tensors} tensors and their metadata, more than {MAX_TENSORS}"
    return None


def _describes_too_many(header: bytes) -> bool:
    outside = _without_text(header)
    return any(outside.count(mark) > most * MAX_TENSORS for mark, most in _MARKS.items())


def _too_many(path: Location) -> InputError:
    return InputError(path, f"more than {MAX_TENSORS} tensors", "check what this file is")


def _entry(path: Location, key: str, value: Any, data: int, state: State) -> TensorInfo:
    """The tensor that a header entry describes, checked field by field."""
    if not _NAME.fullmatch(key):
        raise InputError(path, f"a tensor named {key[:80]!r}", "save it again with plain names")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            path, f"{key} is not described by dtype, shape and data_offsets", "save it again"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            path, f"{key} has dtype {str(dtype)[:80]}", "save it as float32 or bfloat16"
        )
    natural = _is_naturals(shape, MAX_SIDE) and _is_naturals(offsets, MAX_FILE_BYTES)
    if not natural or len(offsets) != 2:
        found = f"{key} has shape {str(shape)[:80]}, offsets {str(offsets)[:80]}"
        raise InputError(path, found, "save it again")
    if len(shape) > MAX_SIDES or 0 in shape:
        raise InputError(path, f"{key} has shape {shape[:9]}", GATHER)
    begin, end = offsets
    if begin > end or end - begin != math.prod(shape) * DTYPES[dtype][1]:
        raise InputError(
            path,
            f"{key} of shape {shape} and dtype {dtype} claims bytes {begin} to {end}",
            "save it again; the header does not match the file",
        )
    return TensorInfo(path, key, DTYPES[dtype][0], tuple(shape), data + begin, end - begin, state)


def _is_naturals(value: Any, most: int) -> bool:
    """Whether `value` is a list of integers from 0 to `most`."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)


def _check_tiling(
    path: Location, entries: list[TensorInfo], data: int, size: int, *, holes: bool
) -> None:
    """Raise InputError unless the tensors fill the file exactly, without gaps and overlaps.

    `holes` allows gaps, where faulty entries were left out.
    """
    position = data
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.length)):
        if entry.start < position or (entry.start > position and not holes):
            raise InputError(path, f"a gap or overlap before {entry.key}", "save it again")
        position = entry.start + entry.length
    if position > size or (position < size and not holes):
        found = f"{size} bytes where its header describes {position}"
        raise InputError(path, found, "upload it again; it is truncated or has bytes added")
