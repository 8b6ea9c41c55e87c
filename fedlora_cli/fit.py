"""Whether adapters fit each other: what can be averaged is of one model and trained one way.

Where they disagree, those that differ from what most say are at fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from fedlora_cli.adapter import Adapter, FullTensor, Module, Role
from fedlora_cli.errors import InputError, Report

T = TypeVar("T")

#: Facts that change what the tensors mean.
_MEANINGS = (
    "bias",
    "lora_bias",
    "dora",
    "target_parameters",
    "layer_replication",
    "invocation_tokens",
)

#: What a tensor is called in an error.
_ROLES: dict[Role, str] = {
    "saved": "trained as {owner}",
    "base": "a base weight",
    "bias": "a trained bias",
    "token": "a trained token",
    "magnitude": "magnitudes of DoRA",
    "lora_bias": "a bias on lora_B",
}


def check_fit(adapters: Sequence[Adapter], report: Report) -> None:
    """Whether what these adapters hold can be one model's."""
    formats = [(adapter.format, adapter) for adapter in adapters]
    expected, example = usual(formats)
    for format_, adapter in formats:
        if format_ != expected:
            found = f"in the format {format_}, but {example.path} is in {expected}"
            cure = "give adapters of one format: the names of their modules differ"
            report(InputError(adapter.path, found, cure))
    _check_experts(adapters, report)
    for name in _MEANINGS:
        agreed(adapters, name, "train all clients with the same configuration", report)
    _check_modules(adapters, report)
    _check_tensors(adapters, report)


def usual(values: Sequence[tuple[T, Adapter]]) -> tuple[T, Adapter]:
    """What most adapters say, and the first that says it: the others are those that do not fit."""
    most = Counter(value for value, _ in values).most_common(1)[0][0]
    return next((value, adapter) for value, adapter in values if value == most)


def _check_modules(adapters: Sequence[Adapter], report: Report) -> None:
    """One shape and one layout of every module in all adapters."""
    said: dict[str, list[tuple[str, Adapter]]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            said.setdefault(name, []).append((_describe(module), adapter))
    for name, values in said.items():
        expected, example = usual(values)
        for described, adapter in values:
            if described != expected:
                found = f"{name} is {described}, but {expected} in {example.path}"
                cure = "leave out the adapters of another base model"
                report(InputError(adapter.weights_file, found, cure))


def _describe(module: Module) -> str:
    layout = module.layout
    text = f"{layout.kind} {module.shape[0]} x {module.shape[1]}"
    if layout.sides:
        text += f" of kernel {' x '.join(map(str, layout.sides[1:]))}"
    return text + (f", one of {layout.experts}" if layout.kind == "experts" else "")


def _check_experts(adapters: Sequence[Adapter], report: Report) -> None:
    """transformers 4 adapts each expert under its own name, 5 all of them under one."""
    together: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        layouts = [module.layout for module in adapter.modules.values()]
        fused = [one.pair.partition(".base_layer")[0] for one in layouts if one.kind == "experts"]
        for owner in dict.fromkeys(fused):
            together.setdefault(owner, []).append(adapter)
    apart: dict[str, dict[Adapter, str]] = {}
    for adapter in adapters if together else ():
        for name in adapter.modules:
            for owner, rest in _splits(name):
                if owner in together and rest.partition(".")[0].isdigit():
                    apart.setdefault(owner, {}).setdefault(adapter, name)
    for owner, single in apart.items():
        example = next(iter(single.values()))
        _exclude(
            (list(single), f"{example} is one expert, where all of {owner} are in one in"),
            (together[owner], f"all of {owner} are in one, where {example} is one expert in"),
            "train all clients with one version of transformers, 4 or 5",
            report,
        )


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The names of the modules that one lies in, outermost first, and its own name in each.

    >>> list(_splits("a.b.c"))
    [('a', 'b.c'), ('a.b', 'c')]
    """
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end]), ".".join(parts[end:])


def _exclude(
    one: tuple[Sequence[Adapter], str],
    other: tuple[Sequence[Adapter], str],
    cure: str,
    report: Report,
) -> None:
    """Two ways that exclude each other, with what to say to those that took each: the fewer are at
    fault, the first ones if both are as many.
    """
    (blamed, found), (others, _) = sorted((one, other), key=lambda way: len(way[0]))
    for adapter in blamed:
        report(InputError(adapter.weights_file, f"{found} {others[0].path}", cure))


def _check_tensors(adapters: Sequence[Adapter], report: Report) -> None:
    """Tensors of one shape and role everywhere, none saved in full that has factors too, and biases
    in all adapters or none.
    """
    said: dict[str, list[tuple[str, Adapter]]] = {}
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            said.setdefault(name, []).append((_role(tensor), adapter))
    for name, values in said.items():
        expected, example = usual(values)
        for described, adapter in values:
            if described != expected:
                found = f"{name} is {described}, but {expected} in {example.path}"
                cure = "give all clients the same model and the same modules_to_save"
                report(InputError(adapter.weights_file, found, cure))
    for name, values in said.items():
        holders = [adapter for _, adapter in values]
        lacking = [adapter for adapter in adapters if name not in adapter.tensors]
        if lacking and holders[0].tensors[name].role == "bias":
            _exclude(
                (lacking, f"no {name}, which is trained in"),
                (holders, f"{name} is trained, which is not in"),
                "train the same biases everywhere; the base model's are not known here",
                report,
            )
    _check_saved(adapters, report)


def _check_saved(adapters: Sequence[Adapter], report: Report) -> None:
    """No module that some save in full has factors in others, nor has one within it."""
    savers: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        owners = {tensor.owner: None for tensor in adapter.tensors.values() if tensor.owner}
        for owner in owners:
            savers.setdefault(owner, []).append(adapter)
    factored: dict[str, dict[Adapter, str]] = {}
    for adapter in adapters if savers else ():
        for module in adapter.modules:
            for owner in (module, *(outer for outer, _ in _splits(module))):
                if owner in savers:
                    factored.setdefault(owner, {}).setdefault(adapter, module)
    for owner, holders in factored.items():
        module = next(iter(holders.values()))
        _exclude(
            (savers[owner], f"{module} is saved in full, but has LoRA factors in"),
            (list(holders), f"{module} has LoRA factors, but is saved in full in"),
            "train it one way everywhere",
            report,
        )


def _role(tensor: FullTensor) -> str:
    """What must be the same everywhere; floating dtypes may differ, as they can be averaged."""
    role = _ROLES[tensor.role].format(owner=tensor.owner)
    kind = "float" if "float" in tensor.dtype else tensor.dtype
    return f"{kind} of shape {list(tensor.shape)}, {role}"


def agreed(adapters: Sequence[Adapter], name: str, cure: str, report: Report) -> Any:
    """The one value of a fact; adapters that do not say are not asked."""
    said = [(getattr(a.facts, name), a) for a in adapters if getattr(a.facts, name) is not None]
    if not said:
        return None
    expected, example = usual(said)
    for value, adapter in said:
        if value != expected:
            label = name.replace("_", " ")
            found = f"its {label} is {_text(value)}, but {_text(expected)} in {example.path}"
            report(InputError(adapter.path, found, cure))
    return expected


def _text(value: Any) -> str:
    """A fact in an error."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))[:200] or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)[:200]
