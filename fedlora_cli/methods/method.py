"""An aggregation method: a rule, a merge and a compression. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedlora_cli.methods.weights import Rule


@dataclass(frozen=True)
class Method:
    """An aggregation: ΔW = merge(factors, rule(holdings)), then compressed.

    - `rule`: the weight of each client at each rank index (`fedlora_cli.methods.weights`).
    - `merge`: "sum", the weighted sum exactly; "average", the product of averaged factors, with
      its cross terms; "shared", B averaged over an A that all clients share.
    - `compress`: "svd", the best approximation at the output rank; "none".
    - `basis_free`: the result depends only on the updates, not on how a client stores its factors:
      (B, A) or (B Q, Qᵀ A).
    - `uses_previous`: the previous global adapter is a further term of the sum.
    - `uses_norms`: the rule reads `Holdings.norms`. Where it does not, they are NaN: large modules
      are then summed client by client, before any norm is known.
    - `with_quorum`: the rule for another quorum, if the method has one.
    """

    name: str
    summary: str
    formula: str
    source: str
    rule: Rule
    merge: Literal["sum", "average", "shared"]
    compress: Literal["svd", "none"]
    basis_free: bool
    uses_previous: bool = False
    uses_norms: bool = True
    with_quorum: Callable[[float], Rule] | None = None

    @property
    def streams(self) -> bool:
        """Whether the sum needs a single pass over the clients, so that a kernel can truncate it
        while it reads them.
        """
        return (self.merge, self.compress, self.uses_norms) == ("sum", "svd", False)
