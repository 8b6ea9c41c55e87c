"""FedAvg of the factors with zero padding (FedIT): the baseline that most people write first.

ΔW = (sum_k p_k √s_k B_k) (sum_k p_k √s_k A_k), shorter factors padded with zeros. The product holds
the cross terms B_j A_k of different clients, and index i shrinks by c_i² within one round.
Source: arXiv:2305.05644.
"""

from __future__ import annotations

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Weights, by_samples


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N, on both factors."""
    return by_samples(holdings)


METHOD = Method(
    name="fedavg",
    summary="factors averaged by samples, zero-padded (FedIT)",
    formula="n_k / N, on both factors",
    source="arXiv:2305.05644",
    rule=rule,
    merge="average",
    compress="none",
    basis_free=False,
    uses_norms=False,
)
