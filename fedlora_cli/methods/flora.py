"""FLoRA: the sample-weighted mean of the updates, exactly, as the concatenation of all factors.

ΔW = [p_1 s_1 B_1 .. p_K s_K B_K] [A_1; ..; A_K] at rank sum r_k. Nothing is lost, and the rank
grows with the number of clients; `flexlora` is its truncation. Source: arXiv:2409.05976.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_samples


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N."""
    return by_samples(holdings)


METHOD = Method(
    name="flora",
    summary="the sample-weighted mean exactly, at rank sum r_k",
    formula="n_k / N",
    source="arXiv:2409.05976",
    rule=rule,
    merge="sum",
    compress="none",
    basis_free=True,
    uses_norms=False,
)
