"""kohya's LoRA files: one safetensors file whose flattened names end in lora_down, lora_up, alpha.

`<module>.lora_down.weight` is A, (r, in) or (r, in, kernel); `<module>.lora_up.weight` is B,
(out, r) or (out, r, 1, 1); `<module>.alpha` is one number, r where it is missing. The update is
alpha / r · B A. Source: networks/lora.py and networks/merge_lora.py of kohya-ss/sd-scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.adapters.adapter import Adapter, Module, NewAdapter, TensorWriter
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.formats import single
from fedlora_cli.formats.single import LoraFile, Names, NewFile
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "lora.safetensors"

#: Every file of an adapter folder that fedlora writes.
FILES = (WEIGHTS, "README.md", "fedlora.json")

_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
_NAMES = Names(endings={_UP: "B", _DOWN: "A", _ALPHA: "alpha"}, B="lora_up", A="lora_down")

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
        "names of PEFT or diffusers among those of kohya's scripts",
        "save one adapter in one file",
    ),
    ((".diff",), "a module that was trained in full", _PLAIN),
)

_UNKNOWN = ("not part of LoRA", _PLAIN)


def owns(key: str) -> bool:
    """Whether a tensor of this name makes a file one of this format."""
    return key.endswith((_UP, _DOWN))


def read(file: LoraFile, on_fault: FaultHandler) -> Adapter:
    """The adapter in a file. The alphas are read with the header, all else later.

    Anything damaged or not understood goes to `on_fault`, fault by fault; if that returns, the
    adapter is what is left without it.
    """
    told = recording(on_fault, file.refused)
    parts, foreign = single.parts_of(file, _NAMES, told)
    kinds = single.kinds_of(foreign, _OTHERS, _UNKNOWN)
    if not parts and not file.refused and not kinds.keys() - {_UNKNOWN}:
        cure = "save the adapter, or move this file away"
        told(InputError(file.weights, "no LoRA tensors in it", cure))
        kinds = {}
    single.report_kinds(file, kinds, told)
    modules: dict[str, Module] = {}
    with catching_faults(told):
        alphas = single.read_alphas(file, parts, told)
        for name in sorted(parts):
            with catching_faults(told):
                if name in alphas or "alpha" not in parts[name]:
                    B, A = single.pair_of(file, name, parts[name], _NAMES)
                    rank = A.shape[0]
                    alpha = alphas.get(name, float(rank))
                    modules[name] = single.module_of(name, B, A, alpha, alpha / rank)
    facts = single.facts_of(file, told)
    return Adapter(file.path, file.weights, modules, {}, facts, format="kohya")


def writing(
    adapter: NewAdapter, folder: Path, provenance: Mapping[str, Any]
) -> AbstractContextManager[TensorWriter]:
    """The weights file in an existing folder; the block puts all that `adapter` describes.

    Raises OSError, and OutputError as `check_new` does.
    """
    return _new_file(adapter, provenance).writing(folder / WEIGHTS)


def check_new(adapter: NewAdapter, provenance: Mapping[str, Any]) -> None:
    """Whether the file that `writing` would write could be read again. Raises OutputError."""
    _new_file(adapter, provenance).check()


def _new_file(adapter: NewAdapter, provenance: Mapping[str, Any]) -> NewFile:
    metadata = {
        "format": "pt",
        "fedlora": json.dumps(provenance, sort_keys=True, allow_nan=False),
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(str(factors.rank) for factors in adapter.factors.values()),
        "ss_network_alpha": _common(str(float(alpha)) for alpha in adapter.alphas.values()),
    }

    def stored(name: str, factors: Factors) -> dict[str, Tensor]:
        B, A = single.as_stored(adapter.layouts[name], factors)
        alpha = single.alpha_as_stored(adapter.alphas[name])
        return {name + _UP: B, name + _DOWN: A, name + _ALPHA: alpha}

    metadata |= single.facts_as_metadata(adapter.facts)
    return NewFile(adapter, metadata, stored)


def _common(values: Iterable[str]) -> str:
    """The value of all modules, or kohya's word for different ones."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
