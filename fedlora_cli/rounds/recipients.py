"""Who is handed an adapter, and what of it: ranks and alphas by module, dtype, full tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, FactorLayout, FullTensor


@dataclass(frozen=True)
class RecipientModule:
    """What a recipient holds of one module: rank and lora_alpha; `shape` is (out, in)."""

    rank: int
    alpha: float
    shape: tuple[int, int]
    layout: FactorLayout


@dataclass(frozen=True, eq=False)
class Recipient:
    """One adapter to write into a folder of its name, in this format. `tensors` are those that it
    gets in full.
    """

    name: str
    modules: Mapping[str, RecipientModule]
    dtype: str
    tensors: Mapping[str, FullTensor]
    facts: AdapterMetadata
    format: str = "peft"

    @property
    def rank(self) -> int:
        """The largest of any module."""
        return max(share.rank for share in self.modules.values())

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) where it trains with rsLoRA (arXiv:2312.03732)."""
        share = self.modules[module]
        return share.alpha / (math.sqrt(share.rank) if self.facts.rslora else share.rank)


def like(name: str, adapter: Adapter, alpha: float | None, dtype: str | None) -> Recipient:
    """A recipient of what this adapter holds: its ranks by module, its alphas, its dtype, heads."""
    return Recipient(
        name=name,
        modules={
            module: RecipientModule(one.rank, alpha or one.alpha, one.shape, one.layout)
            for module, one in adapter.modules.items()
        },
        dtype=dtype or adapter.dtype,
        tensors=adapter.tensors,
        facts=adapter.facts,
        format=adapter.format,
    )
