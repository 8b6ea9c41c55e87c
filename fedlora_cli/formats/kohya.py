"""kohya's LoRA files: one safetensors file whose flattened names end in lora_down, lora_up, alpha.

`<module>.lora_down.weight` is A, (r, in) or (r, in, kernel); `<module>.lora_up.weight` is B,
(out, r) or (out, r, 1, 1); `<module>.alpha` is one number, r by default. The update is
alpha / r · B A. Source: networks/lora.py and networks/merge_lora.py of kohya-ss/sd-scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedlora_cli.adapters.adapter import Adapter, Module, NewAdapter
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.formats import single
from fedlora_cli.formats.shared import as_stored, metadata_of, module_of
from fedlora_cli.formats.single import LoraFile, Names, NewFile
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "lora.safetensors"

_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
_NAMES = Names(endings={_UP: "B", _DOWN: "A", _ALPHA: "alpha"}, B="lora_up", A="lora_down")

_PLAIN = "train plain LoRA (networks.lora)"
_UNKNOWN = ("not part of LoRA", _PLAIN)

#: Parts of keys that are not plain LoRA, with their meaning and the remedy.
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
    (("",), *_UNKNOWN),
)


def owns(key: str) -> bool:
    """Whether a tensor with this name shows a file of this format."""
    return key.endswith((_UP, _DOWN))


def read(file: LoraFile, on_fault: FaultHandler) -> Adapter:
    """The adapter in a file; only the header and the alphas are read. Faults go to `on_fault`."""
    record = recording(on_fault, file.faults)
    parts, foreign = single.parts_of(file, _NAMES, record)
    kinds = single.kinds_of(foreign, _OTHERS)
    if not parts and not file.faults and not kinds.keys() - {_UNKNOWN}:
        cure = "save the adapter, or move this file away"
        record(InputError(file.weights, "no LoRA tensors in it", cure))
        kinds = {}
    single.report_kinds(file, kinds, record)
    modules: dict[str, Module] = {}
    with catching_faults(record):
        alphas = single.read_alphas(file, parts, record)
        for name in sorted(parts):
            with catching_faults(record):
                if name in alphas or "alpha" not in parts[name]:
                    B, A = single.pair_of(file, name, parts[name], _NAMES)
                    rank = A.shape[0]
                    alpha = alphas.get(name, float(rank))
                    modules[name] = module_of(name, B, A, alpha, alpha / rank)
    metadata = single.adapter_metadata(file, record)
    return Adapter(file.path, file.weights, modules, {}, metadata, format="kohya")


def new_file(adapter: NewAdapter, provenance: Mapping[str, Any]) -> NewFile:
    header = metadata_of(provenance) | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(str(factors.rank) for factors in adapter.factors.values()),
        "ss_network_alpha": _common(str(float(alpha)) for alpha in adapter.alphas.values()),
    }

    def stored(name: str, factors: Factors) -> dict[str, Tensor]:
        B, A = as_stored(adapter.layouts[name], factors.B, factors.A)
        alpha = single.alpha_as_stored(adapter.alphas[name])
        return {name + _UP: B, name + _DOWN: A, name + _ALPHA: alpha}

    return NewFile(adapter, header | single.as_header(adapter.metadata), stored)


def _common(values: Iterable[str]) -> str:
    """The value of all modules; "Dynamic", as in kohya's scripts, if they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
