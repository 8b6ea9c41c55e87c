"""Mixtures of experts: LoRA on parameters (`target_parameters`), with one pair for all experts.

PEFT stores A as (experts · rank, in), expert by expert, and B as (out, rank · experts), rank index
by rank index. Each expert has a separate update; B @ A as stored is meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.config import MANY_PARAMETERS, Config
from fedlora_cli.formats.peft.names import endings
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExpertGroup:
    """The experts in one pair of factors: their count, and the rank and alpha of each.

    `parameter` is the parameter that the pair adapts, "" if the file does not show which.
    """

    experts: int
    rank: int
    alpha: float
    parameter: str = ""


#: The most parameters of one module: all orders of them are tried. Known models have two.
_MOST_PARAMETERS = 4

#: The most experts of one module; known models have 512.
_MOST_EXPERTS = 2048


def parameters_of(config: Config, module: str, rows: Sequence[int]) -> tuple[str, ...]:
    """The parameters of this module that its pairs may adapt, sorted; empty if the pairs adapt the
    module itself. `rows` are the rows of every pair's lora_A.

    A target `experts.down_proj` names its module. A target `down_proj` names no module, so it
    applies only to pairs that `target_modules` does not select, and not to a single pair whose
    rows are the module's rank: that pair holds no experts.
    """
    named = {name for owner in endings(module) for name in config.parameters.get(owner, ())}
    bare = {*config.parameters.get("", ())}
    if named:
        return tuple(sorted(named | bare if len(rows) > len(named) else named))
    if not bare or config.targets.names(module):
        return ()
    return () if list(rows) == [config.rank(module)] else tuple(sorted(bare))


def expert_groups(
    weights: Location,
    config: Config,
    module: str,
    parameters: Sequence[str],
    rows: Sequence[int],
) -> list[ExpertGroup]:
    """The experts of each pair around one module. `rows` are the rows of each lora_A, which are
    experts · rank. The pairs adapt some of the `parameters`.

    The file does not show which pair belongs to which parameter. If the ranks of the parameters
    differ, only one order gives all pairs the same number of experts. Raises InputError.
    """
    if len(parameters) > _MOST_PARAMETERS:
        many = len(parameters) > MANY_PARAMETERS
        count = f"more than {MANY_PARAMETERS}" if many else len(parameters)
        found = f"{count} parameters of {module} in target_parameters"
        raise InputError(weights, found, f"name at most {_MOST_PARAMETERS} of one module")
    scales = {
        name: (config.rank(f"{module}.{name}"), config.alpha(f"{module}.{name}"))
        for name in parameters
    }
    fitting: dict[tuple[ExpertGroup, ...], list[tuple[str, ...]]] = {}
    for order in permutations(parameters, len(rows)):
        counts = {count / scales[name][0] for count, name in zip(rows, order, strict=True)}
        experts = counts.pop()
        if not counts and experts.is_integer():
            groups = tuple(ExpertGroup(int(experts), *scales[name]) for name in order)
            fitting.setdefault(groups, []).append(order)
    if not fitting:
        found = f"lora_A of {module} has {' and '.join(map(str, rows))} rows, no multiple of the "
        found += f"ranks of {', '.join(parameters)} in {config.path.name}"
        raise InputError(weights, found, "correct r, rank_pattern or target_parameters")
    if len(fitting) > 1:
        found = f"the file does not show which factors of {module} have which alpha"
        raise InputError(weights, found, "train the parameters of one module with one alpha")
    [(groups, orders)] = fitting.items()
    if max(group.experts for group in groups) > _MOST_EXPERTS:
        found = f"more than {_MOST_EXPERTS} experts of {module}"
        raise InputError(weights, found, "correct r; lora_A has experts x rank rows")
    if len(orders) > 1:
        return list(groups)
    return [replace(group, parameter=name) for group, name in zip(groups, orders[0], strict=True)]


def expert_of(B: Tensor, expert: int, experts: int) -> Tensor:
    """The columns of one expert in B (out, rank · experts), with shape (out, rank).

    >>> import torch
    >>> expert_of(torch.tensor([[11, 21, 12, 22]]), 1, 2)
    tensor([[21, 22]])
    """
    return B.reshape(B.shape[0], -1, experts)[:, :, expert]


def joined(B: Sequence[Tensor], A: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The pair that holds these experts: B (out, rank · experts) and A (experts · rank, in).

    >>> import torch
    >>> joined([torch.tensor([[11, 12]]), torch.tensor([[21, 22]])], [torch.ones(2, 3)] * 2)[0]
    tensor([[11, 21, 12, 22]])
    """
    import torch

    return torch.stack(list(B), dim=2).flatten(1), torch.cat(list(A))
