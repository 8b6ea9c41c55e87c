"""kohya's LoRA files: one safetensors file whose flattened names end in lora_down, lora_up, alpha.

`<module>.lora_down.weight` is A, (r, in) or (r, in, kernel); `<module>.lora_up.weight` is B,
(out, r) or (out, r, 1, 1); `<module>.alpha` is one number, r where it is missing. The update is
alpha / r · B A. Source: networks/lora.py and networks/merge_lora.py of kohya-ss/sd-scripts.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.adapter import Adapter, Facts, Layout, Module, NewAdapter, Put, widest
from fedlora_cli.errors import InputError, Report, keeping, refuse, reporting
from fedlora_cli.factors import Factors
from fedlora_cli.files import safetensors
from fedlora_cli.files.documents import exists
from fedlora_cli.files.entries import Entry
from fedlora_cli.files.untrusted import opened
from fedlora_cli.files.writing import declare
from fedlora_cli.files.writing import writing as write_tensors
from fedlora_cli.formats.peft.fields import LARGEST_ALPHA
from fedlora_cli.formats.peft.names import WEIGHTS as PEFT_WEIGHTS
from fedlora_cli.formats.peft.names import shortened_keys
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "lora.safetensors"

#: Every file of an adapter folder that fedlora writes.
FILES = (WEIGHTS, "README.md", "fedlora.json")

_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
_PLAIN = "train plain LoRA (networks.lora)"

#: What a key of another kind is, told by a part of it, and the way out.
_OTHERS = (
    (("lora_mid",), "a Tucker decomposition", "train without it (use_tucker, use_cp)"),
    (("dora_scale",), "DoRA", "train without dora_wd"),
    (("hada_",), "LoHa", _PLAIN),
    (("lokr_",), "LoKr", _PLAIN),
    (("oft_", "boft"), "OFT", _PLAIN),
    (("on_input", "ia3"), "IA3", _PLAIN),
    (
        ("lora_A", "lora_B", "lora_embedding_"),
        "a name that PEFT and diffusers give",
        f"put the file into a folder with its adapter_config.json, as {PEFT_WEIGHTS}",
    ),
    ((".diff",), "a module that was trained in full", _PLAIN),
)

_UNKNOWN = ("not part of LoRA", _PLAIN)

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


def recognises(path: Location) -> bool:
    """Whether this is such a file, or a folder with one that fedlora wrote."""
    if exists(path / WEIGHTS):
        return True
    named = path.suffix == ".safetensors" and path.name != PEFT_WEIGHTS
    return named and exists(path) and path.is_file()


def read(path: Location, report: Report = refuse) -> Adapter:
    """The adapter in a file or a folder. The alphas are read with the headers, all else later.

    Anything damaged or not understood goes to `report`, fault by fault; if that returns, the
    adapter is what is left without it.
    """
    weights = path if path.is_file() else path / WEIGHTS
    refused: list[InputError] = []
    told = keeping(report, refused)
    entries: dict[str, Entry] = {}
    facts = Facts()
    with reporting(told):
        entries = safetensors.read_header(weights, told)
        facts = _facts(weights, told)
    parts: dict[str, dict[str, Entry]] = {}
    foreign: list[str] = []
    for key, entry in entries.items():
        ending = next((e for e in (_UP, _DOWN, _ALPHA) if key.endswith(e)), None)
        if ending is None:
            foreign.append(key)
        else:
            parts.setdefault(key.removesuffix(ending), {})[ending] = entry
    kinds = _kinds(foreign)
    if not parts and not refused and not kinds.keys() - {_UNKNOWN}:
        cure = "save the adapter, or move away what is none"
        told(InputError(weights, "no LoRA tensors in it", cure))
        kinds = {}
    for (meaning, cure), keys in kinds.items():
        told(InputError(weights, f"{shortened_keys(keys)}: {meaning}", cure))
    modules: dict[str, Module] = {}
    alphas = {name: own[_ALPHA] for name, own in parts.items() if _ALPHA in own}
    with reporting(told):
        values = _alphas(weights, alphas, told)
        for name in sorted(parts):
            with reporting(told):
                if name in values or name not in alphas:
                    modules[name] = _module(weights, name, parts[name], values.get(name), refused)
    return Adapter(path, weights, modules, {}, facts, format="kohya")


def _kinds(keys: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Keys that are not plain LoRA's by what they are and the way out."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        told = next(((m, c) for parts, m, c in _OTHERS if any(p in key for p in parts)), _UNKNOWN)
        kinds.setdefault(told, []).append(key)
    return kinds


def _module(
    weights: Location,
    name: str,
    parts: Mapping[str, Entry],
    alpha: float | None,
    refused: Sequence[InputError],
) -> Module:
    """One adapted module. Raises InputError; what is missing may be what was `refused` before."""
    if not name:
        raise InputError(weights, "factors of a module without a name", "save it again")
    for ending in (_DOWN, _UP):
        if ending not in parts:
            found = f"{name} has no {ending[1:].partition('.')[0]}"
            fault = InputError(weights, found, "save the adapter again, whole")
            raise next(iter(refused), fault)
    B, A = parts[_UP], parts[_DOWN]
    for entry in (B, A):
        if not entry.is_float or len(entry.shape) < 2:
            found = f"{entry.key} has dtype {entry.dtype} and shape {list(entry.shape)}"
            raise InputError(weights, found, "save factors as floating-point matrices or kernels")
    ones = (1,) * (len(A.shape) - 2)
    if B.shape[1:] != (A.shape[0], *ones):
        found = f"{name}: lora_down {list(A.shape)} and lora_up {list(B.shape)} do not fit"
        raise InputError(weights, found, "lora_down is (rank, in, kernel), lora_up (out, rank, 1)")
    rank = A.shape[0]
    alpha = float(rank) if alpha is None else alpha
    layout = Layout("linear", name)
    if ones:
        layout = Layout("convolution", name, sides=A.shape[1:])
    return Module(
        shape=(B.shape[0], math.prod(A.shape[1:])),
        rank=rank,
        alpha=alpha,
        scale=alpha / rank,
        dtype=widest([B.dtype, A.dtype]),
        layout=layout,
        entries=(B, A),
        build=partial(_factors_of, alpha / rank),
    )


def _factors_of(scale: float, tensors: Sequence[Tensor]) -> Factors:
    B, A = tensors
    return Factors(B.flatten(1), A.flatten(1), scale)


def _alphas(weights: Location, entries: Mapping[str, Entry], report: Report) -> dict[str, float]:
    """The alphas by module. Their bytes are decoded here: to refuse a file must not take torch."""
    alphas: dict[str, float] = {}
    if not entries:
        return alphas
    with opened(weights, next(iter(entries.values())).state) as file:
        for name, entry in entries.items():
            with reporting(report):
                if math.prod(entry.shape) != 1 or entry.dtype not in _CODES:
                    found = f"{entry.key} has dtype {entry.dtype} and shape {list(entry.shape)}"
                    raise InputError(weights, found, "alpha is one number")
                raw = file.read(entry.start, entry.length)
                raw = b"\0\0" + raw if entry.dtype == "bfloat16" else raw
                [alpha] = struct.unpack(_CODES[entry.dtype], raw)
                if not 0 < alpha <= LARGEST_ALPHA:
                    cure = f"it must be a positive number, at most {LARGEST_ALPHA:g}"
                    raise InputError(weights, f"{entry.key} is {alpha:g}", cure)
                alphas[name] = float(alpha)
    return alphas


def _facts(weights: Location, report: Report) -> Facts:
    """The base model, and its architecture as the revision: what kohya's metadata tells of them."""
    metadata = safetensors.read_metadata(weights)
    said: dict[str, str | None] = {}
    for key in ("ss_sd_model_name", "ss_base_model_version"):
        value = metadata.get(key)
        if value is not None and len(value) > _LONGEST:
            cure = f"it must be text of at most {_LONGEST} characters"
            report(InputError(weights, f"{key} has {len(value)} characters", cure))
            value = None
        said[key] = None if value in ("", "None") else value  # kohya writes str() of everything
    return Facts(said["ss_sd_model_name"], said["ss_base_model_version"])


@contextmanager
def writing(adapter: NewAdapter, folder: Path, provenance: Mapping[str, Any]) -> Iterator[Put]:
    """The weights file in an existing folder; the block puts all that `adapter` describes.

    Raises OSError.
    """
    metadata = {
        "format": "pt",
        "fedlora": json.dumps(provenance, sort_keys=True, allow_nan=False),
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(str(factors.rank) for factors in adapter.factors.values()),
        "ss_network_alpha": _common(str(float(alpha)) for alpha in adapter.alphas.values()),
    }
    told = {
        "ss_sd_model_name": adapter.facts.base_model,
        "ss_base_model_version": adapter.facts.revision,
    }
    metadata |= {key: value for key, value in told.items() if value is not None}
    declared = {
        key: declare(tensor)
        for name, factors in adapter.factors.items()
        for key, tensor in _stored(adapter, name, factors).items()
    }
    with write_tensors(folder / WEIGHTS, declared, metadata) as write:

        def put(name: str, content: Factors | Tensor) -> None:
            if not isinstance(content, Factors):
                raise AssertionError(f"{name}: this format holds nothing but factors")
            for key, tensor in _stored(adapter, name, content).items():
                write(key, tensor)

        yield put


def _stored(adapter: NewAdapter, name: str, factors: Factors) -> dict[str, Tensor]:
    """The three tensors of a module."""
    import torch

    layout, alpha = adapter.layouts[name], adapter.alphas[name]
    B, A = factors.B, factors.A
    # float32 as kohya has it, unless that would change the scale.
    number = torch.tensor(alpha, dtype=torch.float64)
    single = number.float()
    return {
        name + _UP: B.reshape(*B.shape, *(1 for _ in layout.sides[1:])),
        name + _DOWN: A.reshape(A.shape[0], *(layout.sides or A.shape[1:])),
        name + _ALPHA: single if single.item() == alpha else number,
    }


def _common(values: Iterable[str]) -> str:
    """The value of all modules, or kohya's word for different ones."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
