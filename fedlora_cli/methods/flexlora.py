"""FlexLoRA: the sample-weighted mean of the updates, truncated by SVD.

ΔW = sum_k p_k s_k B_k A_k, p_k = n_k / N. The columns of the weights sum to the coverage c_i, so
under a fixed basis the energy of index i shrinks by c_i² every round: rank collapse. HLoRA
(arXiv:2503.00813) is the same; FLoRIST (arXiv:2506.09199) is the same with `--energy`.
Source: arXiv:2402.11505.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_samples


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N."""
    return by_samples(holdings)


METHOD = Method(
    name="flexlora",
    summary="the sample-weighted mean of the updates, truncated",
    formula="n_k / N",
    source="arXiv:2402.11505",
    rule=rule,
    merge="sum",
    compress="svd",
    basis_free=True,
    uses_norms=False,
)
