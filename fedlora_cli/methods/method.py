"""A method is three choices: rule × merge × compress. This module knows no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedlora_cli.methods.weights import Rule


@dataclass(frozen=True)
class Method:
    """One way to aggregate: ΔW = merge(factors, rule(holdings)), then compress.

    - `rule`: who counts how much at each rank index (`fedlora_cli.methods.weights`).
    - `merge`: "sum", the weighted sum exactly; "average", the product of averaged factors, with
      its cross terms; "shared", B averaged over one A that all clients have.
    - `compress`: "svd", the best approximation at the output rank; "none".
    - `basis_free`: the result depends on the updates alone, not on how a client stores its factors,
      (B, A) or (B Q, Qᵀ A).
    - `uses_previous`: the previous global adapter is one more term of the sum.
    - `with_quorum`: the rule for a quorum other than the method's own, where it has that choice.
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
    with_quorum: Callable[[float], Rule] | None = None
