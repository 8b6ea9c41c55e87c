"""Pairs of factors in a file to modules: linear layers, embeddings, convolutions, experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import FactorLayout, Kind, Module, widest
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.safetensors import GATHER
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.experts import Share, expert_of, parameters_of, shares_of
from fedlora_cli.formats.peft.names import target_of
from fedlora_cli.formats.peft.parts import Parts
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """What there is of the factors under one name, by side: "B" and "A"."""

    kind: Kind
    sides: dict[str, TensorInfo]


def modules_of(
    weights: Location,
    pairs: Mapping[str, Pair],
    config: Config,
    parts: Parts,
    refused: Sequence[InputError],
    on_fault: FaultHandler,
) -> dict[str, Module]:
    """The modules that the pairs hold, in the order of their names. Every fault goes to `on_fault`;
    one that follows from what was `refused` before is that very error.
    """
    whole: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    for name in sorted(pairs):
        with catching_faults(on_fault):
            whole[name] = _factors(weights, name, pairs[name], config, refused, on_fault)
    nested: dict[str, list[str]] = {}
    for name in whole:
        nested.setdefault(target_of(name), []).append(name)
    modules: dict[str, Module] = {}
    for target, names in nested.items():
        with catching_faults(on_fault):
            own = {name: whole[name] for name in names}
            rows = [A.shape[0] for _, A in own.values()]
            parameters = parameters_of(config, target, rows) if config.known else ()
            if parameters:
                modules |= _experts(weights, target, own, parameters, config, parts)
                continue
            for name in names:
                B, A = whole[name]
                if name != target and (target not in whole or name.endswith(".base_layer")):
                    found = f"{name}: factors around factors, which target_parameters does not name"
                    raise InputError(weights, found, "save the adapter again, whole")
                modules[name] = _module(weights, name, pairs[name].kind, B, A, config, on_fault)
    return dict(sorted(modules.items()))


def _factors(
    weights: Location,
    name: str,
    pair: Pair,
    config: Config,
    refused: Sequence[InputError],
    on_fault: FaultHandler,
) -> tuple[TensorInfo, TensorInfo]:
    """B and A under one name, which the file alone shows to be a pair. Raises InputError."""
    if not name:
        raise InputError(weights, "factors of a module without a name", "save it again")
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair.sides:
            found = f"{name} has lora_{other} but no lora_{side}"
            cure = "save the adapter again, whole"
            raise explained(InputError(weights, found, cure), refused)
    B, A = pair.sides["B"], pair.sides["A"]
    broken: list[InputError] = []
    for entry in (B, A):
        with catching_faults(recording(on_fault, broken)):
            _check_factor(weights, entry)
    if broken:
        raise broken[0]
    if B.shape[1] != A.shape[0]:
        if _is_slice(A.shape[0], B.shape[1], name, config):
            found = f"{name}: lora_A has {A.shape[0]} of the {B.shape[1]} rows that its config and "
            found += "lora_B have: one process's slice of it"
            raise InputError(weights, found, GATHER)
        found = f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)} differ in rank"
        cure = "A is (rank, in), B is (out, rank)"
        if len(A.shape) > 2:
            cure += "; train convolutions with groups in full"
        raise InputError(weights, found, cure)
    if len(B.shape) != len(A.shape) or any(side != 1 for side in B.shape[2:]):
        found = f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)}"
        raise InputError(weights, found, "lora_B of a convolution has a kernel of 1")
    return B, A


def _is_slice(rows: int, whole: int, name: str, config: Config) -> bool:
    """Whether the config says that lora_A has the rows of which lora_B knows, in one module or for
    some number of experts, and the file has fewer. FSDP2 and ZeRO-3 shard by rows.
    """
    try:
        rank = config.rank(target_of(name))
    except InputError:  # which was told when the config was read
        return False
    return rows < whole and (whole == rank or (bool(config.target_parameters) and not whole % rank))


def explained(fault: InputError, refused: Sequence[InputError]) -> InputError:
    """Something missing, or what was refused before and may be it."""
    return next(iter(refused), fault)


def _check_factor(weights: Location, entry: TensorInfo) -> None:
    if not entry.is_float:
        found = f"{entry.key} has dtype {entry.dtype}"
        raise InputError(weights, found, "save it as float32, float16 or bfloat16")
    if len(entry.shape) < 2:
        raise InputError(weights, f"{entry.key} has shape {list(entry.shape)}", GATHER)


def _module(
    weights: Location,
    name: str,
    kind: Kind,
    B: TensorInfo,
    A: TensorInfo,
    config: Config,
    on_fault: FaultHandler,
) -> Module:
    """One adapted module. Where the config contradicts its factors, these are the truth."""
    rank, target = A.shape[0], target_of(name)
    with catching_faults(on_fault):
        if config.rank(target) != rank:
            found = f"{name} has rank {rank}, but {config.path.name} says {config.rank(target)}"
            cure = "correct r or rank_pattern; the tensors are the truth"
            raise InputError(weights, found, cure)
    with catching_faults(on_fault):
        if not config.adapts(target):
            found = f"{name} has LoRA tensors, but target_modules does not match it"
            cure = "correct target_modules; PEFT would ignore the tensors"
            raise InputError(weights, found, cure)
    alpha = scale = math.nan
    with catching_faults(on_fault):
        alpha = config.alpha(target)
        scale = config.scale(alpha, rank)
    layout = FactorLayout(kind, name)
    if len(A.shape) > 2:
        layout = FactorLayout("convolution", name, sides=A.shape[1:])
    return Module(
        shape=(B.shape[0], math.prod(A.shape[1:])),
        rank=rank,
        alpha=alpha,
        scale=scale,
        dtype=widest([B.dtype, A.dtype]),
        layout=layout,
        entries=(B, A),
        build=partial(_factors_of, scale),
    )


def _factors_of(scale: float, tensors: Sequence[Tensor]) -> Factors:
    B, A = tensors
    return Factors(B.flatten(1), A.flatten(1), scale)


def _experts(
    weights: Location,
    target: str,
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]],
    parameters: Sequence[str],
    config: Config,
    parts: Parts,
) -> dict[str, Module]:
    """The experts of all pairs around one module, as modules of their own. Raises InputError."""
    names = sorted(pairs)
    if len(names) > len(parameters):
        found = f"{len(names)} pairs of factors of {target}, more than target_parameters names"
        raise InputError(weights, found, "save the adapter again, whole")
    for name in names:
        if len(pairs[name][1].shape) > 2:
            raise InputError(weights, f"{name} is no matrix", "save the adapter again, whole")
    rows = [pairs[name][1].shape[0] for name in names]
    shares = shares_of(weights, config, target, parameters, rows)
    parts.take(sum(share.experts for share in shares), target, "experts")
    return {
        f"{name}[{number}]": module
        for name, share in zip(names, shares, strict=True)
        for number, module in enumerate(_each(name, *pairs[name], share, tuple(parameters), config))
    }


def _each(
    name: str,
    B: TensorInfo,
    A: TensorInfo,
    share: Share,
    parameters: tuple[str, ...],
    config: Config,
) -> Iterator[Module]:
    scale = config.scale(share.alpha, share.rank)
    for number in range(share.experts):
        yield Module(
            shape=(B.shape[0], A.shape[1]),
            rank=share.rank,
            alpha=share.alpha,
            scale=scale,
            dtype=widest([B.dtype, A.dtype]),
            layout=FactorLayout(
                "experts", name, (), number, share.experts, share.parameter, parameters
            ),
            # Its columns of B are interleaved with the others', so that each needs it whole.
            entries=(B, A.part(number * share.rank, share.rank)),
            build=partial(_factors_of_expert, number, share.experts, scale),
        )


def _factors_of_expert(
    number: int, experts: int, scale: float, tensors: Sequence[Tensor]
) -> Factors:
    B, A = tensors
    return Factors(expert_of(B, number, experts), A, scale)
