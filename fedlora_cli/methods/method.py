"""An aggregation method: a rule, a merge and a compression. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_cli.methods.weights import Rule

#: `merge(updates, weights)`: the update of a module, as Factors or as a tensor (out, in).
MergeFunction = Callable[[Sequence[Any], Sequence[Any]], Any]

#: `compress(update, rank)`: the update as Factors of at most that rank.
CompressFunction = Callable[[Any, int], Any]

#: The merges and compressions that have a name. `fedlora_cli.aggregation` has their functions.
MERGES = ("sum", "average", "shared")
COMPRESSIONS = ("svd", "none")

#: The merges of factors; all others merge updates.
AVERAGES = ("average", "shared")


@dataclass(frozen=True)
class Method:
    """An aggregation: ΔW = merge(factors, rule(holdings)), then compressed.

    - `rule`: the weight of each client at each rank index (`fedlora_cli.methods.weights`).
    - `merge`: "sum", the weighted sum exactly; "average", the product of averaged factors, with
      its cross terms; "shared", B averaged over an A that all clients share; or a function
      `merge(updates, weights)`. `updates` are the Factors of the clients that adapt the module, in
      the order of their names: `B` (out, r_k) and `A` (r_k, in) in float64 with the scaling in `B`,
      so that `scale` is 1. `weights` are their weights, tensors (r_k,). The result is Factors, or a
      tensor (out, in).
    - `compress`: "svd", the best approximation at the output rank; "none"; or a function
      `compress(update, rank)` from Factors in float64 of scale 1 to Factors of at most that rank.
      Under "none", a merge function returns at most the largest rank of the clients, or `--rank`.
    - `basis_free`: the result depends only on the updates, not on how a client stores its factors:
      (B, A) or (B Q, Qᵀ A).
    - `uses_previous`: the previous global adapter is a further term of the sum.
    - `uses_norms`: the rule reads `Holdings.norms`. Where it does not, they are NaN: large modules
      are then summed client by client, before any norm is known.
    - `with_quorum`: the rule for another quorum, if the method has one.
    - `distribution`: the name and version of the distribution that a method is installed with. It
      is set when the method is found.
    """

    name: str
    summary: str
    formula: str
    source: str
    rule: Rule
    merge: Literal["sum", "average", "shared"] | MergeFunction
    compress: Literal["svd", "none"] | CompressFunction
    basis_free: bool
    uses_previous: bool = False
    uses_norms: bool = True
    with_quorum: Callable[[float], Rule] | None = None
    distribution: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the sum needs a single pass over the clients, so that a kernel can truncate it
        while it reads them.
        """
        return (self.merge, self.compress, self.uses_norms) == ("sum", "svd", False)

    @property
    def within_span(self) -> bool:
        """Whether the update stays in the spans of the clients' B and A, as named merges do."""
        return isinstance(self.merge, str) and isinstance(self.compress, str)

    @property
    def title(self) -> str:
        """The method in messages.

        >>> from fedlora_cli.methods import METHODS
        >>> METHODS["raflora"].title
        'method raflora'
        """
        return titled(self.name, self.distribution)


def titled(name: str, distribution: str | None) -> str:
    """A method in messages, with its distribution.

    >>> titled("ties", "fedlora-ties 0.1")
    'method ties of fedlora-ties 0.1'
    """
    return f"method {name}" + (f" of {distribution}" if distribution else "")


def step_name(step: str | Callable[..., Any]) -> str:
    """The name of a merge or compression, or the module and the name of its function.

    >>> step_name("sum"), step_name(titled)
    ('sum', 'fedlora_cli.methods.method:titled')
    """
    if isinstance(step, str):
        return step
    name = getattr(step, "__qualname__", type(step).__name__)
    return f"{getattr(step, '__module__', '')}:{name}"
