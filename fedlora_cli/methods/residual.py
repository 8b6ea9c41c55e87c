"""Residual: the previous global adapter keeps what low-rank clients cannot hold.

ΔW = sum_k p_k s_k B_k A_k + s_g B_g diag(1 - c) A_g: a client that holds rank index i has the
weight p_k there, and the previous global adapter, in SVD order, has the rest, 1 - c_i. This is the
rule by holders at quorum 1; without a previous adapter it is FlexLoRA.
Idea: FedHL, arXiv:2505.18494.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_holders


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N for the holders of i, w_g[i] = 1 - N(i) / N."""
    return by_holders(holdings, quorum=1.0)


METHOD = Method(
    name="residual",
    summary="by samples; what low-rank clients cannot hold stays",
    formula="n_k / N, and 1 - c_i for the previous adapter",
    source="arXiv:2505.18494",
    rule=rule,
    merge="sum",
    compress="svd",
    basis_free=True,
    uses_previous=True,
    uses_norms=False,
)
