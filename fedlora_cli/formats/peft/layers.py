"""The LoRA layers of a model that PEFT has wrapped: kinds, shapes and ranks.

Only the wrapped model shows them: names do not distinguish fused experts from linear layers, and
PEFT rewrites the targets of mixtures of experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlora_cli.adapters.adapter import FactorLayout
from fedlora_cli.errors import UsageError
from fedlora_cli.formats.peft.names import ENDINGS, PREFIX, target_of
from fedlora_cli.formats.peft.names import owner_of as saved_owner

#: PEFT's name of a model's adapter.
NAME = "default"

#: The cure for a module that cannot be adapted.
OTHERS = "leave it out, or train it in full with --modules-to-save"


@dataclass(frozen=True)
class Adapted:
    """An adapted module: its `shape` (out, in) and the `layout` of its factors in a file.

    `rank` and `alpha` are multiples of the config's r and lora_alpha: PEFT doubles both if it fuses
    two projections of transformers 4 into one parameter.
    """

    shape: tuple[int, int]
    layout: FactorLayout
    rank: int
    alpha: float


def adapted_modules(model: Any) -> dict[str, Adapted]:
    """Every module that a LoRA layer of the model adapts; each expert is a module.

    The layers must have r and lora_alpha of 1. Raises UsageError for layers other than plain LoRA.
    """
    from peft.tuners.lora.layer import LoraLayer

    result: dict[str, Adapted] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shape, layouts = _read(name, layer)
            rank, alpha = int(layer.r[NAME]), float(layer.lora_alpha[NAME])
            result |= {module: Adapted(shape, layout, rank, alpha) for module, layout in layouts}
    return result


def _read(name: str, layer: Any) -> tuple[tuple[int, int], list[tuple[str, FactorLayout]]]:
    """The shape of a layer's update, and the modules that it adapts. Raises UsageError."""
    if NAME in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        return (B.shape[0], A.shape[1]), [(name, FactorLayout("embedding", name))]
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    shape = (B.shape[0], math.prod(A.shape[1:]))
    # PEFT's layer for parameters, including the `weight` of a router.
    if hasattr(layer, "parameter_name"):
        # As PEFT decides since 0.19.1 (`adapters.expert_layouts`).
        experts_first = layer.get_param().ndim == 3
        swapped = experts_first and not getattr(layer.get_base_layer(), "is_transposed", False)
        if getattr(layer, "_did_swap_in_out_features", None) != swapped:
            found = f"{name}: this version of PEFT stores transposed factors of parameters"
            raise UsageError("--target-parameters", found, "upgrade PEFT to 0.19.1 or later")
        experts = layer.num_experts
        layouts = (
            FactorLayout("experts", name, (), number, experts, layer.parameter_name)
            for number in range(experts)
        )
        return shape, [(f"{name}[{layout.expert}]", layout) for layout in layouts]
    if B.shape[1] != A.shape[0]:
        found = f"{name} is a convolution with groups"
        raise UsageError("--target-modules", found, OTHERS)
    if A.dim() > 2:
        return shape, [(name, FactorLayout("convolution", name, tuple(A.shape[1:])))]
    return shape, [(name, FactorLayout("linear", name))]


def check_tensors(
    modules: Mapping[str, Adapted], state: Mapping[str, Tensor], saved: tuple[str, ...]
) -> dict[str, tuple[Tensor, str]]:
    """The tensors of PEFT's state that are no factors, each with the head that owns it.

    The factors must be those of `modules`, shape by shape. Raises UsageError.
    """
    expected = dict(_factor_shapes(modules))
    stored = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    heads: dict[str, tuple[Tensor, str]] = {}
    for name, tensor in stored.items():
        owner = saved_owner(name, saved)
        if expected.get(name) == tuple(tensor.shape):
            del expected[name]
        elif owner is not None:
            heads[name] = (tensor, owner)
        else:
            raise UsageError("--target-modules", f"{name} is not plain LoRA", OTHERS)
    for name in expected:
        raise UsageError("--target-modules", f"PEFT does not save {name}", OTHERS)
    return heads


def _factor_shapes(modules: Mapping[str, Adapted]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that hold the factors of these modules, by name."""
    for module in modules.values():
        layout = module.layout
        ending_B, ending_A = ENDINGS[layout.kind]
        rows = module.rank * layout.experts
        kernel = (1,) * len(layout.sides[1:])
        yield f"{layout.pair}{ending_B}", (module.shape[0], rows, *kernel)
        yield f"{layout.pair}{ending_A}", (rows, *(layout.sides or module.shape[1:]))


def parameter_name(layout: FactorLayout) -> str:
    """The full name of the parameter that a pair of experts adapts.

    >>> parameter_name(FactorLayout("experts", "mlp.experts.base_layer", parameter="gate_up_proj"))
    'mlp.experts.gate_up_proj'
    """
    return f"{target_of(layout.pair)}.{layout.parameter}"


def parameters_of(modules: Mapping[str, Adapted]) -> frozenset[str]:
    """The full names of the parameters that are adapted."""
    layouts = (module.layout for module in modules.values())
    return frozenset(parameter_name(layout) for layout in layouts if layout.kind == "experts")
