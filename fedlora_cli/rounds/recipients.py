"""The adapters to write for clients: ranks and alphas by module, dtype, full tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, FactorLayout, FullTensor


@dataclass(frozen=True)
class RecipientModule:
    """A module of a recipient's adapter: `alpha` is lora_alpha, `shape` is (out, in)."""

    rank: int
    alpha: float
    shape: tuple[int, int]
    layout: FactorLayout


@dataclass(frozen=True, eq=False)
class Recipient:
    """An adapter to write into a folder `name`; `tensors` are its full tensors."""

    name: str
    modules: Mapping[str, RecipientModule]
    dtype: str
    tensors: Mapping[str, FullTensor]
    metadata: AdapterMetadata
    format: str = "peft"

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(module.rank for module in self.modules.values())

    def scale(self, module: str) -> float:
        """The scaling alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        rank = self.modules[module].rank
        return self.modules[module].alpha / (math.sqrt(rank) if self.metadata.rslora else rank)


def like(name: str, adapter: Adapter, alpha: float | None, dtype: str | None) -> Recipient:
    """A recipient with the adapter's ranks, alphas, dtype and full tensors."""
    return Recipient(
        name=name,
        modules={
            module: RecipientModule(one.rank, alpha or one.alpha, one.shape, one.layout)
            for module, one in adapter.modules.items()
        },
        dtype=dtype or adapter.dtype,
        tensors=adapter.tensors,
        metadata=adapter.metadata,
        format=adapter.format,
    )
