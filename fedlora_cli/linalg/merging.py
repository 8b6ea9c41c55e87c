"""Merges of low-rank updates into a single pair of factors: concatenated, averaged, or shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.lowrank import double


class NotShared(ValueError):
    """The factor A of the term at `position` is not the A that all terms must share."""

    def __init__(self, position: int) -> None:
        super().__init__(f"term {position} has an A of its own")
        self.position = position


def concatenate(terms: Sequence[Factors], weights: Sequence[Tensor], scale: float) -> Factors:
    """The weighted sum exactly, at rank sum r_k: [s_k B_k diag(w_k)] and [A_k] concatenated.

    Source: FLoRA, arXiv:2409.05976.
    """
    B = [term.B * weight / scale for term, weight in zip(map(double, terms), weights, strict=True)]
    return Factors(torch.cat(B, dim=1), torch.cat([term.A.double() for term in terms]), scale)


def averaged(terms: Sequence[Factors], weights: Sequence[Tensor], scale: float) -> Factors:
    """(sum √s_k B_k diag(w_k)) (sum √s_k diag(w_k) A_k), zero-padded, with its cross terms.

    Each scaling is split evenly between the factors, so that equal scalings cancel. Rank indices
    without weight are left out: zero in both factors, they could never be trained.
    """
    counts = [int(weight.count_nonzero()) for weight in weights]
    rank = max(counts)
    out_features, in_features = terms[0].shape
    B = terms[0].B.new_zeros(out_features, rank, dtype=torch.float64)
    A = terms[0].A.new_zeros(rank, in_features, dtype=torch.float64)
    for term, weight, r in zip(terms, weights, counts, strict=True):
        root = (term.scale / scale) ** 0.5
        B[:, :r] += term.B[:, :r].double() * weight[:r] * root
        A[:r] += term.A[:r].double() * weight[:r, None] * root
    return Factors(B, A, scale)


def shared(terms: Sequence[Factors], weights: Sequence[Tensor], scale: float) -> Factors:
    """(sum s_k B_k diag(w_k)) A, if each A_k is the first r_k rows of A; else raises NotShared.

    Source: FFA-LoRA, arXiv:2403.12313.
    """
    A = max(terms, key=lambda term: term.rank).A
    B = terms[0].B.new_zeros(terms[0].shape[0], A.shape[0], dtype=torch.float64)
    for k, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        if not torch.equal(term.A.double(), A[: term.rank].double()):
            raise NotShared(k)
        B[:, : term.rank] += term.B.double() * weight * (term.scale / scale)
    return Factors(B, A.double(), scale)
