"""Full tensors, such as trained heads: averaged by samples instead of as factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.adapters.adapter import FullTensor
from fedlora_cli.adapters.dtypes import majority_dtype
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.clients.cohort import Cohort
from fedlora_cli.errors import InputError
from fedlora_cli.linalg.rounding import same_up_to_rounding
from fedlora_cli.methods.weights import FloatArray, Weights, capped
from fedlora_cli.text import shortened


def tensor_names(plan: Plan) -> tuple[str, ...]:
    """The tensors of the output: those of trusted clients and of the previous adapter.

    Base weights count only if most clients send them, because loading them replaces the base
    model's weights.
    """
    previous = plan.previous.tensors if plan.previous is not None else {}
    averaged = (name for name in plan.cohort.tensors if _is_averaged(plan, name))
    return tuple(sorted({*averaged, *previous}))


def left_out(plan: Plan) -> tuple[str, ...]:
    """Warnings about tensors of untrusted clients alone, and about base weights of few clients."""
    unused = sorted(name for name in plan.cohort.tensors if not _is_averaged(plan, name))
    base = [name for name in unused if _is_base(plan, name)]
    rest = sorted({*unused} - {*base})
    cause = "because only clients that --robust leaves out have them"
    few = "base weights that few clients send are left out"
    return (
        *([f"tensors are left out, {cause}: {shortened(rest)}"] if rest else []),
        *([f"{few}: {shortened(base)}"] if base else []),
    )


def lone_heads(plan: Plan) -> tuple[str, ...]:
    """A warning for every client that is the only source of a tensor."""
    alone: dict[int, list[str]] = {}
    for name in tensor_names(plan):
        holders = _holders(plan, name)
        if _is_averaged(plan, name) and len(holders) == 1 and len(plan.cohort.clients) > 1:
            alone.setdefault(holders[0], []).append(name)
    names = plan.cohort.names
    return tuple(
        f"{shortened(tensors)} from {names[k]} alone: no other client has it"
        for k, tensors in alone.items()
    )


def modules_to_save(plan: Plan) -> tuple[str, ...]:
    """The full names of the modules with tensors in the output."""
    adapters = [client.adapter for client in plan.cohort.clients]
    if plan.previous is not None:
        adapters.append(plan.previous)
    written = set(tensor_names(plan))
    owners = {
        tensor.owner
        for adapter in adapters
        for name, tensor in adapter.tensors.items()
        if name in written
    }
    return tuple(sorted(owner for owner in owners if owner is not None))


def tensor_like(plan: Plan, name: str) -> Tensor:
    """The shape and dtype of `average_tensor`, as a tensor on torch's meta device."""
    if _is_averaged(plan, name):
        first = plan.cohort.clients[_holders(plan, name)[0]].adapter.tensors[name]
        dtype = _dtype(plan, name)
    elif plan.previous is not None:
        first = plan.previous.tensors[name]
        dtype = first.dtype
    else:
        raise KeyError(name)
    return torch.empty(first.shape, dtype=getattr(torch, dtype), device="meta")


def other_dtypes(plan: Plan) -> tuple[str, ...]:
    """A warning for each dtype of clients' tensors that differs from the output's."""
    others: dict[tuple[str, str], set[str]] = {}
    for name in (name for name in plan.cohort.tensors if _is_averaged(plan, name)):
        written = _dtype(plan, name)
        for k in _holders(plan, name):
            sent = plan.cohort.clients[k].adapter.tensors[name].dtype
            if sent != written:
                others.setdefault((sent, written), set()).add(plan.cohort.names[k])
    return tuple(
        f"{shortened(sorted(names))} sent full tensors in {sent}; the means are written in "
        f"{written}, the dtype of most samples"
        for (sent, written), names in sorted(others.items())
    )


def average_tensor(plan: Plan, name: str) -> Tensor:
    """sum_k n_k T_k / sum n_k over trusted clients with the tensor, in the dtype of most samples.

    - A tensor that only the previous adapter has is kept; so are its base weights if few clients
      send any.
    - Integers, such as counters of a normalization layer, are averaged and rounded.
    - Base weights are not trained: they must agree up to the rounding of their dtypes.
    - A bias on lora_B is the mean of s_k b_k, divided by the scaling of the output. It has no rank
      index, so that rules by rank do not apply.

    Raises InputError.
    """
    if not _is_averaged(plan, name):
        if plan.previous is None:
            raise KeyError(name)
        kept = plan.previous.tensors[name]
        value = kept.read()
        if kept.scale is None:
            return value
        return (value.double() * (kept.scale / plan.scale)).to(value.dtype)
    holders = _holders(plan, name)
    tensors = [plan.cohort.clients[k].adapter.tensors[name] for k in holders]
    if tensors[0].role == "base":
        dtype = _dtype(plan, name)
        example = next((one for one in tensors if one.dtype == dtype), tensors[0])
        same = _same_everywhere(plan.cohort, name, example.read())
        return same.to(getattr(torch, dtype))
    first = tensors[0].read()
    weights = [
        float(share) * _scale(plan, k, tensor)
        for k, share, tensor in zip(holders, _shares(plan, holders), tensors, strict=True)
    ]
    mean = weights[0] * first.double()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        mean += weight * tensor.read().double()
    if not first.is_floating_point():
        return mean.round().to(first.dtype)
    result = mean.to(getattr(torch, _dtype(plan, name)))
    if not bool(torch.isfinite(result).all()):
        raise InputError(name, f"its mean overflows {result.dtype}", "save the heads as float32")
    return result


def _dtype(plan: Plan, name: str) -> str:
    """The dtype that most samples have, for a floating tensor of clients."""
    holders = _holders(plan, name)
    dtypes = [plan.cohort.clients[k].adapter.tensors[name].dtype for k in holders]
    if len(set(dtypes)) == 1 or "float" not in dtypes[0]:
        return dtypes[0]
    return majority_dtype(dtypes, [plan.cohort.clients[k].samples for k in holders])


def _is_averaged(plan: Plan, name: str) -> bool:
    """Whether clients decide the tensor: one trusted client, or for base weights most clients."""
    holders = _holders(plan, name)
    if holders and _is_base(plan, name):
        return 2 * len(holders) > len(plan.cohort.clients)
    return bool(holders)


def _is_base(plan: Plan, name: str) -> bool:
    tensors = (client.adapter.tensors.get(name) for client in plan.cohort.clients)
    return next(one.role == "base" for one in tensors if one is not None)


def _holders(plan: Plan, name: str) -> list[int]:
    """The positions of the clients with the tensor and with trust above 0."""
    clients = enumerate(plan.cohort.clients)
    trusted = np.ones(len(plan.cohort.clients)) if plan.trust is None else plan.trust
    return [k for k, one in clients if name in one.adapter.tensors and trusted[k] > 0]


def _shares(plan: Plan, holders: Sequence[int]) -> FloatArray:
    """The weights of these clients, which add up to 1.

    With too few clients for `--max-weight`, all weights are equal.
    """
    samples = plan.samples[holders]
    shares = samples / samples.sum() if samples.any() else np.full(len(holders), 1 / len(holders))
    limit = max(plan.options.max_weight or 1.0, 1 / np.count_nonzero(shares))
    return capped(Weights(shares[:, None], np.zeros(1)), limit).clients[:, 0]


def _scale(plan: Plan, k: int, tensor: FullTensor) -> float:
    """The factor of client k's bias under the output's scaling; 1 for other tensors."""
    return 1.0 if tensor.scale is None else plan.clipped(k) * tensor.scale / plan.scale


def _same_everywhere(cohort: Cohort, name: str, example: Tensor) -> Tensor:
    """The example, if every client has the same tensor. Raises InputError."""
    for client in cohort.clients:
        tensor = client.adapter.tensors.get(name)
        if tensor is not None and not same_up_to_rounding(tensor.read(), example):
            raise InputError(
                client.adapter.weights_file,
                f"its base weights {name} differ from the other clients'",
                "start all clients from one base model; name what they trained in modules_to_save",
            )
    return example
