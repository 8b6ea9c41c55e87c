"""HetLoRA: factors averaged by the norm of each client's update, padded with zeros.

ΔW = (sum_k w_k √s_k B_k) (sum_k w_k √s_k A_k), w_k = ‖ΔW_k‖_F / sum_j ‖ΔW_j‖_F, taken per module.
The norms come from rank × rank Gram matrices. Sample counts play no part. The paper's pruning and
regularisation happen while training, not here. Source: arXiv:2401.06432.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_norm


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = ‖ΔW_k‖_F / sum_j ‖ΔW_j‖_F, on both factors."""
    return by_norm(holdings)


METHOD = Method(
    name="hetlora",
    summary="factors averaged by update norm, zero-padded",
    formula="‖ΔW_k‖ / Σ_j ‖ΔW_j‖, on both factors",
    source="arXiv:2401.06432",
    rule=rule,
    merge="average",
    compress="none",
    basis_free=False,
)
