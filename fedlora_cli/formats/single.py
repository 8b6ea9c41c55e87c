"""LoRA in one file of weights: what the formats that are such a file have in common.

The names of the files do not tell these formats apart; the names of their tensors do. So the header
is read here, once, and handed to the format that owns it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedlora_cli.adapters.adapter import (
    AdapterMetadata,
    FactorLayout,
    Module,
    NewAdapter,
    TensorWriter,
    widest,
)
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.files import safetensors
from fedlora_cli.files.documents import exists
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.untrusted import opened
from fedlora_cli.files.writing import Declared, check_header, declare
from fedlora_cli.files.writing import writing as write_tensors
from fedlora_cli.formats.peft.fields import LARGEST_ALPHA
from fedlora_cli.formats.peft.names import WEIGHTS as PEFT_WEIGHTS
from fedlora_cli.formats.peft.names import shortened_keys
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor

#: What a tensor is to its module: a factor, or the number alpha.
Side = Literal["B", "A", "alpha"]

#: What keys of another kind are and the way out, told by a part of a key.
Others = Sequence[tuple[tuple[str, ...], str, str]]

#: What `struct` calls a number of a dtype that alpha may have; bfloat16 is half of a float32.
_CODES = {
    "float64": "<d",
    "float32": "<f",
    "float16": "<e",
    "bfloat16": "<f",
    "int64": "<q",
    "int32": "<i",
    "int16": "<h",
}

#: Characters of a path, which a base model may be.
_LONGEST = 4096


@dataclass(frozen=True)
class LoraFile:
    """The header of the file `weights`; `path` is the file or its folder, as it was named.

    `refused` are the faults that were found so far: a missing tensor may be one of them.
    """

    path: Location
    weights: Location
    entries: Mapping[str, TensorInfo] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    refused: list[InputError] = field(default_factory=list)


@dataclass(frozen=True)
class Names:
    """The endings of a format's keys, and what it calls the factors B and A."""

    endings: Mapping[str, Side]
    B: str
    A: str


def weights_in(path: Location, names: Iterable[str]) -> list[Location]:
    """The files of weights that a folder has under these names, or the file that `path` is itself.

    Nothing is read.
    """
    held = [path / name for name in names if exists(path / name)]
    named = path.suffix == ".safetensors" and path.name != PEFT_WEIGHTS
    if not held and named and exists(path) and path.is_file():
        return [path]
    return held


def the_weights(path: Location, names: Iterable[str]) -> Location | None:
    """The one file of weights of `weights_in`. Raises InputError where there are several."""
    held = weights_in(path, names)
    if len(held) > 1:
        found = f"both {held[0].name} and {held[1].name} in it"
        raise InputError(path, found, "keep one adapter in one folder")
    return held[0] if held else None


def read_header(path: Location, weights: Location, on_fault: FaultHandler) -> LoraFile:
    """The header of a file; empty where that cannot be read. Faults go to `on_fault`."""
    refused: list[InputError] = []
    told = recording(on_fault, refused)
    with catching_faults(told):
        entries, metadata = safetensors.read_contents(weights, told)
        return LoraFile(path, weights, entries, metadata, refused)
    return LoraFile(path, weights, refused=refused)


def parts_of(
    file: LoraFile, names: Names, on_fault: FaultHandler
) -> tuple[dict[str, dict[Side, TensorInfo]], list[str]]:
    """The tensors of every module by their side, and the keys that are of none."""
    parts: dict[str, dict[Side, TensorInfo]] = {}
    foreign: list[str] = []
    for key, entry in file.entries.items():
        ending = next((ending for ending in names.endings if key.endswith(ending)), None)
        if ending is None:
            foreign.append(key)
            continue
        module, side = key.removesuffix(ending), names.endings[ending]
        first = parts.setdefault(module, {}).setdefault(side, entry)
        if first is not entry:
            found = f"{key} and {first.key} are one factor"
            on_fault(InputError(file.weights, found, "save one adapter in one file"))
    return parts, foreign


def kinds_of(
    keys: Iterable[str], others: Others, unknown: tuple[str, str]
) -> dict[tuple[str, str], list[str]]:
    """Foreign keys by their meaning and the way out; `unknown` is those of keys in no table."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        told = next(((m, c) for parts, m, c in others if any(p in key for p in parts)), unknown)
        kinds.setdefault(told, []).append(key)
    return kinds


def report_kinds(
    file: LoraFile, kinds: Mapping[tuple[str, str], Sequence[str]], on_fault: FaultHandler
) -> None:
    """One fault for every kind of foreign keys."""
    for (meaning, cure), keys in kinds.items():
        on_fault(InputError(file.weights, f"{shortened_keys(keys)}: {meaning}", cure))


def pair_of(
    file: LoraFile, name: str, parts: Mapping[Side, TensorInfo], names: Names
) -> tuple[TensorInfo, TensorInfo]:
    """B and A of a module, which fit each other. Raises InputError."""
    if not name:
        raise InputError(file.weights, "factors of a module without a name", "save it again")
    sides: tuple[tuple[Side, str], ...] = (("A", names.A), ("B", names.B))
    for side, called in sides:
        if side not in parts:
            fault = InputError(
                file.weights, f"{name} has no {called}", "save the adapter again, whole"
            )
            raise next(iter(file.refused), fault)
    B, A = parts["B"], parts["A"]
    for entry in (B, A):
        if not entry.is_float or len(entry.shape) < 2:
            found = f"{entry.key} has dtype {entry.dtype} and shape {list(entry.shape)}"
            cure = "save factors as floating-point matrices or kernels"
            raise InputError(file.weights, found, cure)
    ones = (1,) * (len(A.shape) - 2)
    if B.shape[1:] != (A.shape[0], *ones):
        found = f"{name}: {names.A} {list(A.shape)} and {names.B} {list(B.shape)} do not fit"
        cure = f"{names.A} is (rank, in, kernel), {names.B} (out, rank, 1)"
        raise InputError(file.weights, found, cure)
    return B, A


def module_of(name: str, B: TensorInfo, A: TensorInfo, alpha: float, scale: float) -> Module:
    """An adapted module: a linear layer, or a convolution where A has a kernel."""
    layout = FactorLayout("linear", name)
    if len(A.shape) > 2:
        layout = FactorLayout("convolution", name, sides=A.shape[1:])
    return Module(
        shape=(B.shape[0], math.prod(A.shape[1:])),
        rank=A.shape[0],
        alpha=alpha,
        scale=scale,
        dtype=widest([B.dtype, A.dtype]),
        layout=layout,
        entries=(B, A),
        build=partial(_factors_of, scale),
    )


def _factors_of(scale: float, tensors: Sequence[Tensor]) -> Factors:
    B, A = tensors
    return Factors(B.flatten(1), A.flatten(1), scale)


def read_alphas(
    file: LoraFile, parts: Mapping[str, Mapping[Side, TensorInfo]], on_fault: FaultHandler
) -> dict[str, float]:
    """The alphas by module. Their bytes are decoded here: to refuse a file must not take torch."""
    entries = {name: own["alpha"] for name, own in parts.items() if "alpha" in own}
    alphas: dict[str, float] = {}
    if not entries:
        return alphas
    with opened(file.weights, next(iter(entries.values())).state) as source:
        for name, entry in entries.items():
            with catching_faults(on_fault):
                if math.prod(entry.shape) != 1 or entry.dtype not in _CODES:
                    found = f"{entry.key} has dtype {entry.dtype} and shape {list(entry.shape)}"
                    raise InputError(file.weights, found, "alpha is one number")
                raw = source.read(entry.start, entry.length)
                raw = b"\0\0" + raw if entry.dtype == "bfloat16" else raw
                [alpha] = struct.unpack(_CODES[entry.dtype], raw)
                if not 0 < alpha <= LARGEST_ALPHA:
                    cure = f"it must be a positive number, at most {LARGEST_ALPHA:g}"
                    raise InputError(file.weights, f"{entry.key} is {alpha:g}", cure)
                alphas[name] = float(alpha)
    return alphas


def facts_of(file: LoraFile, on_fault: FaultHandler) -> AdapterMetadata:
    """The base model, and its architecture as the revision, from the metadata that kohya's scripts
    began with and others took over.
    """
    said: dict[str, str | None] = {}
    for key in ("ss_sd_model_name", "ss_base_model_version"):
        value = file.metadata.get(key)
        if value is not None and len(value) > _LONGEST:
            cure = f"it must be text of at most {_LONGEST} characters"
            on_fault(InputError(file.weights, f"{key} has {len(value)} characters", cure))
            value = None
        said[key] = None if value in ("", "None") else value  # kohya writes str() of everything
    return AdapterMetadata(said["ss_sd_model_name"], said["ss_base_model_version"])


def facts_as_metadata(facts: AdapterMetadata) -> dict[str, str]:
    """What `facts_of` reads again."""
    told = {"ss_sd_model_name": facts.base_model, "ss_base_model_version": facts.revision}
    return {key: value for key, value in told.items() if value is not None}


@dataclass(frozen=True)
class NewFile:
    """A file of weights that can be written; `stored` are the tensors of a module by key."""

    adapter: NewAdapter
    metadata: Mapping[str, str]
    stored: Callable[[str, Factors], Mapping[str, Tensor]]

    @property
    def declared(self) -> dict[str, Declared]:
        """All tensors by key, without values."""
        return {
            key: declare(tensor)
            for name, factors in self.adapter.factors.items()
            for key, tensor in self.stored(name, factors).items()
        }

    def check(self) -> None:
        """Whether the file could be read again. Raises OutputError."""
        check_header(self.declared, self.metadata)

    @contextmanager
    def writing(self, file: Path) -> Iterator[TensorWriter]:
        """The file; the block puts all that the adapter describes. Raises OSError, and OutputError
        as `check` does.
        """
        with write_tensors(file, self.declared, self.metadata) as write:

            def put(name: str, content: Factors | Tensor) -> None:
                if not isinstance(content, Factors):
                    raise AssertionError(f"{name}: this format holds nothing but factors")
                for key, tensor in self.stored(name, content).items():
                    write(key, tensor)

            yield put


def as_stored(layout: FactorLayout, factors: Factors) -> tuple[Tensor, Tensor]:
    """B and A with the sides that a convolution gives them."""
    B, A = factors.B, factors.A
    return (
        B.reshape(*B.shape, *(1 for _ in layout.sides[1:])),
        A.reshape(A.shape[0], *(layout.sides or A.shape[1:])),
    )


def alpha_as_stored(alpha: float) -> Tensor:
    """float32 as the scripts have it, unless that would change the scale."""
    import torch

    number = torch.tensor(alpha, dtype=torch.float64)
    single = number.float()
    return single if single.item() == alpha else number
