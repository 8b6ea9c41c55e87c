"""The modules in the pairs of factors: linear layers, embeddings, convolutions, experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import BASE_LAYER, FactorLayout, Kind, Module
from fedlora_cli.adapters.dtypes import widest
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, recording
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.safetensors import GATHER
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.experts import expert_groups, expert_of, parameters_of
from fedlora_cli.formats.peft.names import target_of
from fedlora_cli.formats.peft.parts import Parts
from fedlora_cli.formats.shared import module_of
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


#: B and A of one pair.
_Tensors = tuple[TensorInfo, TensorInfo]


@dataclass(frozen=True)
class WeightsFile:
    """A weights file, its config, its limit of parts, and its faults, which may explain others."""

    path: Location
    config: Config
    parts: Parts
    faults: Sequence[InputError] = ()

    def fault(self, found: str, cure: str = "save the adapter again, whole") -> InputError:
        return InputError(self.path, found, cure)


@dataclass(frozen=True)
class Pair:
    """The factors with one name, by side: "B" and "A". One of them may be missing."""

    kind: Kind
    sides: dict[str, TensorInfo]


def modules_of(
    file: WeightsFile, pairs: Mapping[str, Pair], on_fault: FaultHandler
) -> dict[str, Module]:
    """The modules of the pairs, in the order of their names. Every fault goes to `on_fault`."""
    config = file.config
    complete: dict[str, _Tensors] = {}
    for name in sorted(pairs):
        with catching_faults(on_fault):
            complete[name] = _factors(file, name, pairs[name], on_fault)
    by_target: dict[str, dict[str, _Tensors]] = {}
    for name, tensors in complete.items():
        by_target.setdefault(target_of(name), {})[name] = tensors
    modules: dict[str, Module] = {}
    for target, inside in by_target.items():
        with catching_faults(on_fault):
            rows = [A.shape[0] for _, A in inside.values()]
            parameters = parameters_of(config, target, rows) if config.known else ()
            if parameters:
                modules |= _experts(file, target, inside, parameters)
                continue
            for name, (B, A) in inside.items():
                if name != target and (target not in complete or name.endswith(BASE_LAYER)):
                    found = f"{name} has nested factors, but target_parameters does not name them"
                    raise file.fault(found)
                modules[name] = _module(file, name, pairs[name].kind, B, A, on_fault)
    return dict(sorted(modules.items()))


def _factors(file: WeightsFile, name: str, pair: Pair, on_fault: FaultHandler) -> _Tensors:
    """B and A with one name and matching shapes. Raises InputError."""
    if not name:
        raise file.fault("factors of a module without a name", "save it again")
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair.sides:
            missing = file.fault(f"{name} has lora_{other} but no lora_{side}")
            raise explained(missing, file.faults)
    B, A = pair.sides["B"], pair.sides["A"]
    broken: list[InputError] = []
    for info in (B, A):
        with catching_faults(recording(on_fault, broken)):
            if not info.is_float:
                cure = "save it as float32, float16 or bfloat16"
                raise file.fault(f"{info.key} has dtype {info.dtype}", cure)
            if len(info.shape) < 2:
                raise file.fault(f"{info.key} has shape {list(info.shape)}", GATHER)
    if broken:
        raise broken[0]
    if B.shape[1] != A.shape[0]:
        if _is_slice(A.shape[0], B.shape[1], name, file.config):
            found = f"{name}: lora_A is one process's slice, {A.shape[0]} of {B.shape[1]} rows"
            raise file.fault(found, GATHER)
        found = f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)} differ in rank"
        cure = "A is (rank, in), B is (out, rank)"
        if len(A.shape) > 2:
            cure += "; train convolutions with groups in full"
        raise file.fault(found, cure)
    if len(B.shape) != len(A.shape) or any(side != 1 for side in B.shape[2:]):
        found = f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)}"
        raise file.fault(found, "lora_B of a convolution has a kernel of 1")
    return B, A


def _is_slice(rows: int, whole: int, name: str, config: Config) -> bool:
    """Whether the file has only some of the rows of lora_A that the config gives a module, or its
    experts. FSDP2 and ZeRO-3 shard by rows.
    """
    try:
        rank = config.rank(target_of(name))
    except InputError:  # reported when the config was read
        return False
    return rows < whole and (whole == rank or (bool(config.target_parameters) and not whole % rank))


def explained(fault: InputError, faults: Sequence[InputError]) -> InputError:
    """The first of the earlier `faults`, which may be the cause of this fault, or this fault."""
    return next(iter(faults), fault)


def _module(
    file: WeightsFile, name: str, kind: Kind, B: TensorInfo, A: TensorInfo, on_fault: FaultHandler
) -> Module:
    """One adapted module. If the config contradicts the factors, the factors count."""
    config, rank, target = file.config, A.shape[0], target_of(name)
    with catching_faults(on_fault):
        if config.rank(target) != rank:
            found = f"{name} has rank {rank}, but {config.path.name} gives it {config.rank(target)}"
            raise file.fault(found, "correct r or rank_pattern to match the tensors")
    with catching_faults(on_fault):
        if not config.adapts(target):
            found = f"{name} has LoRA tensors, but target_modules does not match it"
            raise file.fault(found, "correct target_modules; PEFT would ignore the tensors")
    alpha = scale = math.nan
    with catching_faults(on_fault):
        alpha = config.alpha(target)
        scale = config.scale(alpha, rank)
    return module_of(name, B, A, alpha, scale, kind)


def _experts(
    file: WeightsFile, target: str, pairs: Mapping[str, _Tensors], parameters: tuple[str, ...]
) -> dict[str, Module]:
    """The experts of all pairs around one module, each as a module. Raises InputError."""
    names = sorted(pairs)
    if len(names) > len(parameters):
        found = f"{len(names)} pairs of factors of {target}, more than target_parameters names"
        raise file.fault(found)
    for name in names:
        if len(pairs[name][1].shape) > 2:
            raise file.fault(f"{name} is not a matrix")
    rows = [pairs[name][1].shape[0] for name in names]
    groups = expert_groups(file.path, file.config, target, parameters, rows)
    file.parts.take(sum(group.experts for group in groups), target, "experts")
    modules: dict[str, Module] = {}
    for name, group in zip(names, groups, strict=True):
        B, A = pairs[name]
        count, rank, scale = group.experts, group.rank, file.config.scale(group.alpha, group.rank)
        for number in range(count):
            modules[f"{name}[{number}]"] = Module(
                shape=(B.shape[0], A.shape[1]),
                rank=rank,
                alpha=group.alpha,
                scale=scale,
                dtype=widest([B.dtype, A.dtype]),
                layout=FactorLayout(
                    "experts", name, (), number, count, group.parameter, parameters
                ),
                # The columns of B are interleaved between the experts, so each reads the whole B.
                infos=(B, A.part(number * rank, rank)),
                build=partial(_factors_of_expert, number, count, scale),
            )
    return modules


def _factors_of_expert(
    number: int, experts: int, scale: float, tensors: Sequence[Tensor]
) -> Factors:
    B, A = tensors
    return Factors(expert_of(B, number, experts), A, scale)
