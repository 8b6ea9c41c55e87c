"""A global adapter to a PEFT folder that every PEFT-compatible tool reads the same way."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedlora_cli.adapter import Facts, Kind
from fedlora_cli.factors import Factors
from fedlora_cli.files import safetensors
from fedlora_cli.formats.peft.names import CONFIG, EMBEDDINGS, ENDINGS, PREFIX, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """An adapter ready to be written. `alphas` are lora_alpha by module: the scale of its factors
    is alpha / r, or alpha / sqrt(r) where `facts.rslora` says so.
    """

    factors: Mapping[str, Factors]
    alphas: Mapping[str, float]
    kinds: Mapping[str, Kind]
    tensors: Mapping[str, Tensor]
    modules_to_save: tuple[str, ...]
    facts: Facts


def write(adapter: NewAdapter, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write config and weights into an existing folder. Raises OSError.

    Exact module names, and patterns only where ranks or alphas differ: what serving engines ignore
    cannot be misread. `provenance` goes into the metadata, not into the config, where PEFT would
    warn about it.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.factors.items():
        ending_B, ending_A = ENDINGS[adapter.kinds[name]]
        tensors[f"{PREFIX}{name}{ending_B}"] = factors.B.contiguous()
        tensors[f"{PREFIX}{name}{ending_A}"] = factors.A.contiguous()
    for name, tensor in adapter.tensors.items():
        tensors[f"{PREFIX}{name}"] = tensor.contiguous()
    metadata = {"format": "pt", "fedlora": json.dumps(provenance, sort_keys=True, allow_nan=False)}
    safetensors.write(folder / WEIGHTS, tensors, metadata)
    config = json.dumps(_config(adapter), indent=2, sort_keys=True, allow_nan=False)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")


def _targets(names: Iterable[str]) -> list[str] | str:
    """`target_modules` for these modules: their full names, which every tool understands.

    An entry of a list also matches every name that ends in it after a dot. For a full name that
    takes a model that holds a copy of itself; for a name without a dot it is likely, and then an
    expression is written, which matches whole names only.
    """
    ordered = sorted(names)
    if all("." in name or name in EMBEDDINGS for name in ordered):
        return ordered
    return "|".join(map(re.escape, ordered))


def _config(adapter: NewAdapter) -> dict[str, Any]:
    """What PEFT needs to apply scale · B A, and nothing that came from a client unread."""
    rank, ranks = _usual({name: one.rank for name, one in adapter.factors.items()})
    alpha, alphas = _usual({name: _number(adapter.alphas[name]) for name in adapter.factors})
    facts = adapter.facts
    return {
        "alpha_pattern": alphas,
        "base_model_name_or_path": facts.base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": facts.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": facts.dropout,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "revision": facts.revision,
        "target_modules": _targets(adapter.factors),
        "task_type": facts.task_type,
        "use_dora": False,
        "use_rslora": facts.rslora,
    }


def _usual(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    r"""The value that most modules have, and expressions for exactly those with another.

    >>> _usual({"a.q": 8, "a.v": 8, "a.o": 4})
    (8, {'^a\\.o': 4})
    """
    usual = Counter(values[name] for name in sorted(values)).most_common(1)[0][0]
    others = {name: value for name, value in values.items() if value != usual}
    return usual, {f"^{re.escape(name)}": others[name] for name in sorted(others)}


def _number(value: float) -> int | float:
    """A whole number as one, as people write alpha."""
    return int(value) if value == int(value) else value
