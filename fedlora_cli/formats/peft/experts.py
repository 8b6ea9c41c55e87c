"""Mixtures of experts: LoRA on parameters (`target_parameters`), one pair of factors for all.

PEFT stores A as (experts · rank, in), expert by expert, and B as (out, rank · experts), direction
by direction, so that B @ A means nothing; each expert is an update of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.config import MANY_PARAMETERS, Config
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Share:
    """How many experts one pair of factors holds, and what each of them has. `parameter` is the one
    that the pair adapts, "" where the file does not tell.
    """

    experts: int
    rank: int
    alpha: float
    parameter: str = ""


#: The most parameters of one module: orders of them are tried. Known models have two.
_MOST_PARAMETERS = 4

#: The most experts of one module; known models have 512.
_MOST_EXPERTS = 2048


def parameters_of(config: Config, module: str, rows: Sequence[int]) -> tuple[str, ...]:
    """The parameters of this module that its pairs of factors adapt, sorted; empty where the pairs
    adapt the module itself. `rows` are those of every pair's lora_A.

    A target `experts.down_proj` names the module. A target `down_proj` names no module: it owns
    only pairs that `target_modules` does not explain, and no single pair whose rows are the rank of
    the module, which holds no experts.
    """
    parts = module.split(".")
    owners = (".".join(parts[start:]) for start in range(len(parts)))
    named = {name for owner in owners for name in config.parameters.get(owner, ())}
    bare = {*config.parameters.get("", ())}
    if named:
        return tuple(sorted(named | bare if len(rows) > len(named) else named))
    if not bare or config.targets.names(module):
        return ()
    return () if list(rows) == [config.rank(module)] else tuple(sorted(bare))


def shares_of(
    weights: Location,
    config: Config,
    module: str,
    parameters: Sequence[str],
    rows: Sequence[int],
) -> list[Share]:
    """What each pair around one module holds; `rows` are those of their lora_A, experts · rank.
    The pairs adapt some of the `parameters`.

    The file does not say which pair belongs to which parameter. Where their ranks differ, only one
    order gives all pairs the same number of experts. Raises InputError.
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
    fitting: dict[tuple[Share, ...], list[tuple[str, ...]]] = {}
    for order in permutations(parameters, len(rows)):
        ranks, alphas = zip(*(scales[name] for name in order), strict=True)
        counts = {count / rank for count, rank in zip(rows, ranks, strict=True)}
        experts = counts.pop()
        if not counts and experts.is_integer():
            shares = tuple(Share(int(experts), *one) for one in zip(ranks, alphas, strict=True))
            fitting.setdefault(shares, []).append(order)
    if not fitting:
        found = (
            f"lora_A of {module} has {' and '.join(map(str, rows))} rows, which are no multiple "
        )
        found += f"of the ranks that {config.path.name} gives {', '.join(parameters)}"
        raise InputError(weights, found, "correct r, rank_pattern or target_parameters")
    if len(fitting) > 1:
        found = f"the file does not say which factors of {module} have which alpha"
        raise InputError(weights, found, "train the parameters of one module with one alpha")
    [(shares, orders)] = fitting.items()
    if max(share.experts for share in shares) > _MOST_EXPERTS:
        found = f"more than {_MOST_EXPERTS} experts of {module}"
        raise InputError(weights, found, "correct r; lora_A has experts x rank rows")
    if len(orders) > 1:
        return list(shares)
    return [replace(share, parameter=name) for share, name in zip(shares, orders[0], strict=True)]


def expert_of(B: Tensor, expert: int, experts: int) -> Tensor:
    """The columns of one expert in a B of (out, rank · experts). Shape (out, rank).

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
