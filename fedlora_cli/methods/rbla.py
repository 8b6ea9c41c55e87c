"""RBLA: factors averaged row by row over the clients that hold the row.

ΔW = (sum_k √s_k B_k diag(w_k)) (sum_k √s_k diag(w_k) A_k), w_k[i] = n_k / N(i): raFLoRA's weights,
but on the factors instead of the updates, so the cross terms stay. Source: arXiv:2408.08699.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_holders


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N(i) for the holders of i, on both factors."""
    return by_holders(holdings, quorum=0.0)


METHOD = Method(
    name="rbla",
    summary="factors averaged over the holders of each row",
    formula="n_k / N(i), on both factors",
    source="arXiv:2408.08699",
    rule=rule,
    merge="average",
    compress="none",
    basis_free=False,
    uses_norms=False,
)
