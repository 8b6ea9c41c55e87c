"""The common part of the formats that are one weights file.

The names of the tensors, not of the file, show the format. So the header is read here, once, and
passed to the format that owns it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedlora_cli.adapters.adapter import AdapterMetadata, NewAdapter, TensorWriter
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.files import safetensors
from fedlora_cli.files.documents import exists
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.untrusted import opened
from fedlora_cli.files.writing import Declared, check_header, declare
from fedlora_cli.files.writing import writing as write_tensors
from fedlora_cli.formats.peft.fields import LARGEST_ALPHA, LONGEST_TEXT
from fedlora_cli.formats.peft.names import WEIGHTS as PEFT_WEIGHTS
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location
from fedlora_cli.text import shortened

if TYPE_CHECKING:
    from torch import Tensor

#: The part of a module that a tensor holds: a factor, or the number alpha.
Side = Literal["B", "A", "alpha"]

#: Rows of parts of keys, the meaning of such keys, and the remedy.
Others = Sequence[tuple[tuple[str, ...], str, str]]

#: The codes of `struct` for the dtypes of alpha; a bfloat16 is the upper half of a float32.
_CODES = {
    "float64": "<d",
    "float32": "<f",
    "float16": "<e",
    "bfloat16": "<f",
    "int64": "<q",
    "int32": "<i",
    "int16": "<h",
}


@dataclass(frozen=True)
class LoraFile:
    """The header of the file `weights`, and its faults so far, which may explain others; `path` is
    the file or its folder, as the user named it.
    """

    path: Location
    weights: Location
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    faults: list[InputError] = field(default_factory=list)


@dataclass(frozen=True)
class Names:
    """The endings of a format's keys, and its names of the factors B and A."""

    endings: Mapping[str, Side]
    B: str
    A: str


def weights_in(path: Location, names: Iterable[str]) -> list[Location]:
    """The weights files with these names in a folder, or `path` if it is one. No file is read."""
    files = [path / name for name in names if exists(path / name)]
    named = path.suffix == ".safetensors" and path.name != PEFT_WEIGHTS
    if not files and named and exists(path) and path.is_file():
        return [path]
    return files


def read_header(path: Location, weights: Location, on_fault: FaultHandler) -> LoraFile:
    """The header of a file; empty if it cannot be read. Faults go to `on_fault`."""
    faults: list[InputError] = []
    record = recording(on_fault, faults)
    with catching_faults(record):
        return LoraFile(path, weights, *safetensors.read_contents(weights, record), faults)
    return LoraFile(path, weights, faults=faults)


def parts_of(
    file: LoraFile, names: Names, on_fault: FaultHandler
) -> tuple[dict[str, dict[Side, TensorInfo]], list[str]]:
    """The tensors of every module by side, and the keys that belong to no module."""
    parts: dict[str, dict[Side, TensorInfo]] = {}
    foreign: list[str] = []
    for key, info in file.tensors.items():
        ending = next((ending for ending in names.endings if key.endswith(ending)), None)
        if ending is None:
            foreign.append(key)
            continue
        module, side = key.removesuffix(ending), names.endings[ending]
        first = parts.setdefault(module, {}).setdefault(side, info)
        if first is not info:
            found = f"{key} and {first.key} are one factor"
            on_fault(InputError(file.weights, found, "save one adapter in one file"))
    return parts, foreign


def kinds_of(keys: Iterable[str], others: Others) -> dict[tuple[str, str], list[str]]:
    """The keys by the meaning and remedy of the first row that has a part of the key."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        kind = next((m, cure) for parts, m, cure in others if any(p in key for p in parts))
        kinds.setdefault(kind, []).append(key)
    return kinds


def report_kinds(
    file: LoraFile, kinds: Mapping[tuple[str, str], Sequence[str]], on_fault: FaultHandler
) -> None:
    """Report one fault for each kind of foreign keys."""
    for (meaning, cure), keys in kinds.items():
        on_fault(InputError(file.weights, f"{shortened(sorted(keys), 1)}: {meaning}", cure))


def pair_of(
    file: LoraFile, name: str, parts: Mapping[Side, TensorInfo], names: Names
) -> tuple[TensorInfo, TensorInfo]:
    """B and A of a module, with matching shapes. Raises InputError."""
    if not name:
        raise InputError(file.weights, "factors of a module without a name", "save it again")
    sides: tuple[tuple[Side, str], ...] = (("A", names.A), ("B", names.B))
    for side, factor in sides:
        if side not in parts:
            cure = "save the adapter again, whole"
            fault = InputError(file.weights, f"{name} has no {factor}", cure)
            raise next(iter(file.faults), fault)
    B, A = parts["B"], parts["A"]
    for info in (B, A):
        if not info.is_float or len(info.shape) < 2:
            found = f"{info.key} has dtype {info.dtype} and shape {list(info.shape)}"
            cure = "save factors as floating-point matrices or kernels"
            raise InputError(file.weights, found, cure)
    ones = (1,) * (len(A.shape) - 2)
    if B.shape[1:] != (A.shape[0], *ones):
        found = f"{name}: {names.A} {list(A.shape)} and {names.B} {list(B.shape)} do not fit"
        cure = f"{names.A} is (rank, in, kernel), {names.B} (out, rank, 1)"
        raise InputError(file.weights, found, cure)
    return B, A


def read_alphas(
    file: LoraFile, parts: Mapping[str, Mapping[Side, TensorInfo]], on_fault: FaultHandler
) -> dict[str, float]:
    """The alphas by module, decoded without torch, so that a bad file fails before its import."""
    infos = {name: sides["alpha"] for name, sides in parts.items() if "alpha" in sides}
    alphas: dict[str, float] = {}
    if not infos:
        return alphas
    with opened(file.weights, next(iter(infos.values())).state) as source:
        for name, info in infos.items():
            with catching_faults(on_fault):
                if math.prod(info.shape) != 1 or info.dtype not in _CODES:
                    found = f"{info.key} has dtype {info.dtype} and shape {list(info.shape)}"
                    raise InputError(file.weights, found, "save alpha as one number")
                raw = source.read(info.start, info.length)
                raw = b"\0\0" + raw if info.dtype == "bfloat16" else raw
                [alpha] = struct.unpack(_CODES[info.dtype], raw)
                if not 0 < alpha <= LARGEST_ALPHA:
                    cure = f"it must be a positive number, at most {LARGEST_ALPHA:g}"
                    raise InputError(file.weights, f"{info.key} is {alpha:g}", cure)
                alphas[name] = float(alpha)
    return alphas


#: The fields of the metadata for the base model and for its architecture, from kohya's scripts.
_BASE_MODEL, _REVISION = "ss_sd_model_name", "ss_base_model_version"


def adapter_metadata(file: LoraFile, on_fault: FaultHandler) -> AdapterMetadata:
    """The base model, and its architecture as the revision, from the header of the file."""

    def text(key: str) -> str | None:
        value = file.metadata.get(key)
        if value is not None and len(value) > LONGEST_TEXT:
            cure = f"it must be text of at most {LONGEST_TEXT} characters"
            on_fault(InputError(file.weights, f"{key} has {len(value)} characters", cure))
            return None
        return None if value in ("", "None") else value  # kohya writes str() of every value

    return AdapterMetadata(text(_BASE_MODEL), text(_REVISION))


def as_header(metadata: AdapterMetadata) -> dict[str, str]:
    """The fields of a file's header that `adapter_metadata` reads."""
    fields = {_BASE_MODEL: metadata.base_model, _REVISION: metadata.revision}
    return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True)
class NewFile:
    """A weights file to be written; `stored` returns the tensors of a module by key."""

    adapter: NewAdapter
    metadata: Mapping[str, str]
    stored: Callable[[str, Factors], Mapping[str, Tensor]]

    @property
    def declared(self) -> dict[str, Declared]:
        return {
            key: declare(tensor)
            for name, factors in self.adapter.factors.items()
            for key, tensor in self.stored(name, factors).items()
        }

    def check(self) -> None:
        """Raise OutputError if the file could not be read again."""
        check_header(self.declared, self.metadata)

    @contextmanager
    def writing(self, file: Location) -> Iterator[TensorWriter]:
        """Create the file; the block writes every module. Raises OSError and OutputError."""
        with write_tensors(file, self.declared, self.metadata) as write:

            def put(name: str, content: Factors | Tensor) -> None:
                if not isinstance(content, Factors):
                    raise AssertionError(f"{name}: this format holds nothing but factors")
                for key, tensor in self.stored(name, content).items():
                    write(key, tensor)

            yield put


def alpha_as_stored(alpha: float) -> Tensor:
    """Alpha as float32, as the scripts write it, or as float64 if float32 would change it."""
    import torch

    number = torch.tensor(alpha, dtype=torch.float64)
    single = number.float()
    return single if single.item() == alpha else number
