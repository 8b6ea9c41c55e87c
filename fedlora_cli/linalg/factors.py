"""A low-rank update, stored as its factors and never formed.

Letters in all modules: clients k = 1..K, samples n_k, ranks r_k, `B (out, rank)`,
`A (rank, in)`, rank index i = 0..R-1, singular values `s` in descending order, energy = s².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = scale · B A, with B (out, rank) and A (rank, in). `scale` is PEFT's scaling: alpha / r,
    or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732).
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def transposed(self) -> Factors:
        """ΔWᵀ = scale · Aᵀ Bᵀ."""
        return Factors(self.A.T, self.B.T, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.B.shape[0], self.A.shape[1]
