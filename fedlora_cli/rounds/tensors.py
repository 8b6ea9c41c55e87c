"""Tensors with absolute values, trained heads for example: averaged by samples, not as factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.adapters.adapter import FullTensor, usual_dtype
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.clients.cohort import Cohort
from fedlora_cli.errors import InputError
from fedlora_cli.linalg.rounding import same_up_to_rounding
from fedlora_cli.methods.weights import FloatArray, Weights, capped
from fedlora_cli.text import shortened


def tensor_names(plan: Plan) -> tuple[str, ...]:
    """The tensors of the output: those of the trusted clients, and the previous adapter's own.

    Base weights only where most clients send them: loading them replaces the base model's.
    """
    previous = plan.previous.tensors if plan.previous is not None else {}
    held = (name for name in plan.cohort.tensors if _is_held(plan, name))
    return tuple(sorted({*held, *previous}))


def left_out(plan: Plan) -> tuple[str, ...]:
    """A warning where tensors of clients do not count: nobody who has them is trusted, or they are
    base weights of few.
    """
    unheld = sorted(name for name in plan.cohort.tensors if not _is_held(plan, name))
    base = [name for name in unheld if _is_base(plan, name)]
    rest = sorted({*unheld} - {*base})
    who = "only clients that --robust leaves out have them"
    few = "base weights that few clients send are left out"
    return (
        *([f"tensors are left out, as {who}: {shortened(rest)}"] if rest else []),
        *([f"{few}: {shortened(base)}"] if base else []),
    )


def lone_heads(plan: Plan) -> tuple[str, ...]:
    """A warning for every client that alone has tensors which replace the base model's."""
    alone: dict[int, list[str]] = {}
    for name in tensor_names(plan):
        holders = _holders(plan, name)
        if _is_held(plan, name) and len(holders) == 1 and len(plan.cohort.clients) > 1:
            alone.setdefault(holders[0], []).append(name)
    names = plan.cohort.names
    return tuple(
        f"{shortened(held)} of {names[k]} alone: no other client has a say in it"
        for k, held in alone.items()
    )


def modules_to_save(plan: Plan) -> tuple[str, ...]:
    """The modules that own these tensors, by their full names."""
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
    """What `average_tensor` will be, on torch's meta device: its shape and dtype."""
    if _is_held(plan, name):
        first = plan.cohort.clients[_holders(plan, name)[0]].adapter.tensors[name]
        dtype = _dtype(plan, name)
    elif plan.previous is not None:
        first = plan.previous.tensors[name]
        dtype = first.dtype
    else:
        raise KeyError(name)
    return torch.empty(first.shape, dtype=getattr(torch, dtype), device="meta")


def other_dtypes(plan: Plan) -> tuple[str, ...]:
    """A warning where clients sent tensors in another dtype than they are written in."""
    others: dict[tuple[str, str], set[str]] = {}
    for name in (one for one in plan.cohort.tensors if _is_held(plan, one)):
        taken = _dtype(plan, name)
        for k in _holders(plan, name):
            own = plan.cohort.clients[k].adapter.tensors[name].dtype
            if own != taken:
                others.setdefault((own, taken), set()).add(plan.cohort.names[k])
    return tuple(
        f"{shortened(sorted(who))} sent full tensors in {own}; the means are written in {taken}, "
        "by most of the samples"
        for (own, taken), who in sorted(others.items())
    )


def average_tensor(plan: Plan, name: str) -> Tensor:
    """sum_k n_k T_k / sum n_k over the trusted clients that have it, in the dtype of most samples.

    A tensor that only the previous adapter has is kept, as are its base weights where few clients
    send any. Whole numbers, such as the counters of a
    normalisation layer, are averaged and rounded. Base weights beside an adapted embedding are not
    trained, so they must be the same everywhere, up to the rounding of their dtypes; they are
    written in the dtype of most samples. A bias on lora_B is the mean of the s_k b_k,
    divided by the scaling of the output: it has no rank index, so that no rule by rank holds for
    it. Raises InputError.
    """
    if not _is_held(plan, name):
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
    """The dtype of a tensor that clients hold: by most of their samples, if it is of fractions."""
    holders = _holders(plan, name)
    dtypes = [plan.cohort.clients[k].adapter.tensors[name].dtype for k in holders]
    if len(set(dtypes)) == 1 or "float" not in dtypes[0]:
        return dtypes[0]
    return usual_dtype(dtypes, [plan.cohort.clients[k].samples for k in holders])


def _is_held(plan: Plan, name: str) -> bool:
    """Whether the clients decide what the tensor is: any that has it, of base weights most."""
    holders = _holders(plan, name)
    if holders and _is_base(plan, name):
        return 2 * len(holders) > len(plan.cohort.clients)
    return bool(holders)


def _is_base(plan: Plan, name: str) -> bool:
    tensors = (client.adapter.tensors.get(name) for client in plan.cohort.clients)
    return next(one.role == "base" for one in tensors if one is not None)


def _holders(plan: Plan, name: str) -> list[int]:
    """The clients that have the tensor, but for those that are not trusted at all."""
    clients = enumerate(plan.cohort.clients)
    trusted = np.ones(len(plan.cohort.clients)) if plan.trust is None else plan.trust
    return [k for k, one in clients if name in one.adapter.tensors and trusted[k] > 0]


def _shares(plan: Plan, holders: Sequence[int]) -> FloatArray:
    """The weights of these clients, which add up to 1: what is absolute cannot be left to nobody.

    So `--max-weight` holds as far as there are enough of them.
    """
    samples = plan.samples[holders]
    shares = samples / samples.sum() if samples.any() else np.full(len(holders), 1 / len(holders))
    limit = max(plan.options.max_weight or 1.0, 1 / np.count_nonzero(shares))
    return capped(Weights(shares[:, None], np.zeros(1)), limit).clients[:, 0]


def _scale(plan: Plan, k: int, tensor: FullTensor) -> float:
    """What client k's update is multiplied by under the output's scaling; 1 for absolute values."""
    return 1.0 if tensor.scale is None else plan.clipped(k) * tensor.scale / plan.scale


def _same_everywhere(cohort: Cohort, name: str, usual: Tensor) -> Tensor:
    """The tensor, if it is that of every client. Raises InputError."""
    for client in cohort.clients:
        tensor = client.adapter.tensors.get(name)
        if tensor is not None and not same_up_to_rounding(tensor.read(), usual):
            raise InputError(
                client.adapter.weights_file,
                f"its base weights {name} differ from the other clients'",
                "start all clients from one base model; name what they trained in modules_to_save",
            )
    return usual
