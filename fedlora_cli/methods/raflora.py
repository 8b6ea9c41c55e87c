"""raFLoRA: each rank index is averaged over the clients that hold it.

ΔW = sum_k s_k B_k diag(w_k) A_k with w_k[i] = n_k / N(i), N(i) the samples of the holders of i.
Each column of the weights sums to 1, so no partition fades. An index without holders keeps the
value of the previous global adapter. RB-LoRA (Findings of EACL 2026, p. 1737) publishes the same
weights as data share times rank rarity. Source: arXiv:2602.13486.
"""

from __future__ import annotations

from functools import partial

from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import Holdings, Rule, Weights, by_holders


def rule(holdings: Holdings) -> Weights:
    """w_k[i] = n_k / N(i) for the holders of i; without holders, the previous adapter."""
    return by_holders(holdings, quorum=0.0)


def with_quorum(quorum: float) -> Rule:
    """w_k[i] = n_k / max(N(i), q N): bounds the influence of few holders."""
    return partial(by_holders, quorum=quorum)


METHOD = Method(
    name="raflora",
    summary="each rank index averaged over its holders",
    formula="n_k / N(i), N(i) the samples of the holders of i",
    source="arXiv:2602.13486",
    rule=rule,
    merge="sum",
    compress="svd",
    basis_free=False,
    uses_previous=True,
    uses_norms=False,
    with_quorum=with_quorum,
)
