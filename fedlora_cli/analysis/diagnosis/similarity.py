"""The similarity of the clients' updates, from the Gram matrices of their singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.linalg.lowrank import Svd
from fedlora_cli.linalg.spectrum import FloatArray


class Products(NamedTuple):
    """Sums over modules, each (K, K): inner products ‹ΔW_j, ΔW_k›, overlaps of the left and of the
    right singular subspaces, and the number of modules that both clients adapt.
    """

    inner: FloatArray
    left: FloatArray
    right: FloatArray
    modules: FloatArray

    def plus(self, other: Products) -> Products:
        return Products(*map(np.add, self, other))


def products(updates: Sequence[Svd | None]) -> Products:
    """The products of one module of K clients; an update is None if the client does not adapt it.

    ‹ΔW_j, ΔW_k› = tr((B_jᵀ B_k)(A_k A_jᵀ)) with B = U diag(s) and A = Vᵀ; the overlaps are
    ‖U_jᵀ U_k‖_F² / min(r_j, r_k), φ of the LoRA paper (arXiv:2106.09685, §7.2), likewise for V.
    """
    present = {k: svd for k, svd in enumerate(updates) if svd is not None and svd.s.numel()}
    total = np.zeros((4, len(updates), len(updates)))
    if present:
        svds = list(present.values())
        ranks = [svd.s.numel() for svd in svds]
        U, V = torch.cat([svd.U for svd in svds], dim=1), torch.cat([svd.Vh for svd in svds])
        s = torch.cat([svd.s for svd in svds])
        left, right = U.T @ U, V @ V.T
        smaller = np.minimum.outer(ranks, ranks)
        at = np.ix_(list(present), list(present))
        total[0][at] = _block_sums(left * right * torch.outer(s, s), ranks)
        total[1][at] = _block_sums(left.square(), ranks) / smaller
        total[2][at] = _block_sums(right.square(), ranks) / smaller
        total[3][at] = 1.0
    return Products(*total)


def cosines(inner: FloatArray) -> FloatArray:
    """‹ΔW_j, ΔW_k› / (‖ΔW_j‖ ‖ΔW_k‖), NaN if an update is zero. Shape (K, K).

    >>> cosines(np.array([[4.0, 2.0], [2.0, 1.0]]))
    array([[1., 1.],
           [1., 1.]])
    """
    norms = np.sqrt(np.diagonal(inner))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine: FloatArray = np.clip(inner / np.outer(norms, norms), -1.0, 1.0)
    return cosine


def cosines_to_others(inner: FloatArray, samples: FloatArray) -> FloatArray:
    """The cosine of every update with the sample-weighted sum of all others. Shape (K,).

    >>> cosines_to_others(np.array([[4.0, 2.0], [2.0, 1.0]]), np.array([1.0, 3.0]))
    array([1., 1.])
    """
    weights = np.broadcast_to(samples, inner.shape) * (1 - np.eye(len(samples)))
    dot = np.einsum("kj,kj->k", weights, inner)
    norms = np.einsum("kj,ji,ki->k", weights, inner, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.sqrt(np.diagonal(inner))
        cosine: FloatArray = np.clip(dot / (norm * np.sqrt(np.maximum(norms, 0.0))), -1.0, 1.0)
    return cosine


def _block_sums(matrix: Tensor, ranks: Sequence[int]) -> FloatArray:
    """The sums of the blocks (j, k) of a matrix whose rows and columns are grouped by client."""
    starts = np.cumsum([0, *ranks[:-1]])
    rows = np.add.reduceat(matrix.numpy(), starts, axis=0)
    sums: FloatArray = np.add.reduceat(rows, starts, axis=1)
    return sums
