"""Whether adapters can be averaged: one base model, one way of training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from fedlora_cli.adapters.adapter import Adapter, FullTensor, Module, Role
from fedlora_cli.clients.majority import agreed, exclude, majority
from fedlora_cli.clients.renames import renames
from fedlora_cli.errors import FaultHandler

T = TypeVar("T")

#: Metadata that changes the meaning of the tensors.
_MEANINGS = ("bias", "lora_bias", "dora", "layer_replication", "invocation_tokens")

#: Metadata that differs between the tools that save adapters.
_STYLES = ("key_prefix", "alpha_source")

#: The description of a tensor in an error.
_ROLES: dict[Role, str] = {
    "saved": "trained as {owner}",
    "base": "a base weight",
    "bias": "a trained bias",
    "token": "a trained token",
    "magnitude": "magnitudes of DoRA",
    "lora_bias": "a bias on lora_B",
}

#: The part of a name that PEFT adds to an embedding of which it trains some rows.
_ROWS = ".token_adapter."

_ONE_MODEL = "give all clients the same model and the same modules_to_save"
_ONE_WAY = "train it in the same way in all clients"


def check_compatibility(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Report to `on_fault` every adapter that cannot be averaged with the others."""
    _check_formats(adapters, on_fault)
    _check_experts(adapters, on_fault)
    for name in _MEANINGS:
        agreed(adapters, name, "train all clients with the same configuration", on_fault)
    for name in _STYLES:
        agreed(adapters, name, "save the adapters of all clients with one tool", on_fault)
    _check_names(adapters, on_fault)
    _check_modules(adapters, on_fault)
    _check_tensors(adapters, on_fault)


def _check_formats(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """All adapters have one format. An empty adapter is skipped: it has other faults."""
    formats = [
        (adapter.format, adapter) for adapter in adapters if adapter.modules or adapter.tensors
    ]
    if not formats:
        return
    most = majority(formats)
    for format_, adapter in formats:
        if format_ != most.value:
            found = f"in the format {format_}, but {most.example.path} is in {most.value}"
            cure = "give adapters of one format: the names of their modules differ"
            on_fault(most.fault(adapter.path, found, cure))


def _by_name(entries: Iterable[tuple[str, Adapter, T]]) -> dict[str, dict[Adapter, T]]:
    """The adapters that have each of the names, with the first value of the name in each."""
    by_name: dict[str, dict[Adapter, T]] = {}
    for name, adapter, value in entries:
        by_name.setdefault(name, {}).setdefault(adapter, value)
    return by_name


def _check_descriptions(
    descriptions: Mapping[str, Mapping[Adapter, str]],
    cure: str,
    on_fault: FaultHandler,
    note: Callable[[str, str], str] = lambda description, other: "",
) -> None:
    """All descriptions of a name are equal; `note` adds to the message about two that differ."""
    for name, by_adapter in descriptions.items():
        most = majority([(description, adapter) for adapter, description in by_adapter.items()])
        for adapter, description in by_adapter.items():
            if description != most.value:
                found = f"{name} is {description}, but {most.value} in {most.example.path}"
                found += note(description, most.value)
                on_fault(most.fault(adapter.weights_file, found, cure))


def _check_names(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """No module has different names in different adapters: it would be averaged as two modules."""
    contents: list[dict[str, Module | FullTensor]] = [{**a.modules, **a.tensors} for a in adapters]
    for rename in renames(contents, _kind):
        name, other = rename.names
        holders = [[adapters[i] for i in sorted(side)] for side in rename.holders]
        exclude(
            (holders[0], f"{name} is the same module as {other} in"),
            (holders[1], f"{other} is the same module as {name} in"),
            "train all clients on one version of transformers, and wrap the model in one way",
            on_fault,
        )


def _kind(content: Module | FullTensor) -> object:
    """The properties that do not depend on the name."""
    return _describe(content) if isinstance(content, Module) else (content.role, content.shape)


def _check_modules(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Every module has one shape and one layout in all adapters."""
    modules = ((name, a, module) for a in adapters for name, module in a.modules.items())
    descriptions = _by_name((name, a, _describe(module)) for name, a, module in modules)
    cure = "leave out the adapters of another base model"
    _check_descriptions(descriptions, cure, on_fault, _transposes)


def _describe(module: Module) -> str:
    layout = module.layout
    text = f"{layout.kind} {module.shape[0]} x {module.shape[1]}"
    if layout.sides:
        text += f" of kernel {' x '.join(map(str, layout.sides[1:]))}"
    if layout.kind == "experts":
        # The names of nested pairs around one module do not show the parameter of each pair.
        text += f", one of {layout.experts}, of {' and '.join(layout.parameters)}"
    return text


def _transposes(description: str, other: str) -> str:
    """A note if the descriptions are fused experts with exchanged sides."""
    first, second = (
        re.fullmatch(r"experts (\d+) x (\d+)(.*)", text) for text in (description, other)
    )
    if first is None or second is None or first.groups() != (second[2], second[1], second[3]):
        return ""
    return (
        ", its transpose, as PEFT before 0.19 stored experts (PEFT 0.19.0 and transformers before "
        "5 exchange sides, too)"
    )


def _check_experts(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Experts are adapted one by one (transformers 4) or together (5), not both."""
    together = _by_name(
        (module.layout.target, adapter, module)
        for adapter in adapters
        for module in adapter.modules.values()
        if module.layout.kind == "experts"
    )
    apart = _by_name(
        (owner, adapter, name)
        for adapter in (adapters if together else ())
        for name in adapter.modules
        for owner, rest in _splits(name)
        if owner in together and rest.partition(".")[0].isdigit()
    )
    for owner, names in apart.items():
        example = next(iter(names.values()))
        exclude(
            (names, f"{example} is one expert, but all of {owner} are together in"),
            (together[owner], f"all of {owner} are together, but {example} is one expert in"),
            "train all clients with one version of transformers, 4 or 5",
            on_fault,
        )


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The names of the modules around a module, outermost first, each with the rest of the name.

    >>> list(_splits("a.b.c"))
    [('a', 'b.c'), ('a.b', 'c')]
    """
    for at, character in enumerate(name):
        if character == ".":
            yield name[:at], name[at + 1 :]


def _check_tensors(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Every tensor has one shape and role, every module is trained in one way, and biases are
    trained in all adapters or none.
    """
    tensors = [(name, a, tensor) for a in adapters for name, tensor in a.tensors.items()]
    descriptions = _by_name((name, a, _role(tensor)) for name, a, tensor in tensors)
    _check_descriptions(descriptions, _ONE_MODEL, on_fault)
    for name, holders in descriptions.items():
        is_bias = next(iter(holders)).tensors[name].role == "bias"
        lacking = [a for a in adapters if a not in holders] if is_bias else []
        if lacking:
            exclude(
                (lacking, f"no {name}, but it is trained in"),
                (holders, f"{name} is trained, but not in"),
                "train the same biases everywhere; the biases of the base model are unknown here",
                on_fault,
            )
    _check_saved(adapters, on_fault)
    _check_tokens(adapters, on_fault)


def _check_saved(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """No module that an adapter saves in full has LoRA factors, on it or inside it, in another."""
    tensors = ((adapter, t) for adapter in adapters for t in adapter.tensors.values())
    savers = _by_name(
        (tensor.owner, adapter, tensor) for adapter, tensor in tensors if tensor.owner
    )
    factored = _by_name(
        (owner, adapter, module)
        for adapter in (adapters if savers else ())
        for module in adapter.modules
        for owner in (module, *(outer for outer, _ in _splits(module)))
        if owner in savers
    )
    for owner, holders in factored.items():
        module = next(iter(holders.values()))
        exclude(
            (savers[owner], f"{module} is saved in full, but has LoRA factors in"),
            (holders, f"{module} has LoRA factors, but is saved in full in"),
            _ONE_WAY,
            on_fault,
        )


def _check_tokens(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """The trained tokens of an embedding have one width, and the embedding is trained in no other
    way: PEFT 0.21 would not load that.
    """
    tokens = [(*token, adapter) for adapter in adapters for token in _tokens(adapter)]
    rows = _by_name((embedding, adapter, _role(tensor)) for embedding, _, tensor, adapter in tokens)
    _check_descriptions(rows, _ONE_MODEL, on_fault)
    for embedding, holders in rows.items():
        # If a client trained both, PEFT stores the embedding below the rows, under another name.
        weight = f"{embedding}.weight"
        saved = [a for a in adapters if weight in a.tensors and a.tensors[weight].role == "saved"]
        factored = [a for a in adapters if embedding in a.modules]
        for others, way in ((factored, "has LoRA factors"), (saved, "is saved in full")):
            if others:
                exclude(
                    (others, f"{embedding} {way}, but has trained tokens in"),
                    (holders, f"{embedding} has trained tokens, but {way} in"),
                    _ONE_WAY,
                    on_fault,
                )
    _check_same_tokens(adapters, rows, on_fault)


def _check_same_tokens(
    adapters: Sequence[Adapter],
    holders: Mapping[str, Mapping[Adapter, str]],
    on_fault: FaultHandler,
) -> None:
    """No two embeddings have the same trained tokens, unless one adapter trained both.

    PEFT takes such entries for one if the base model ties its embeddings, which the files do not
    show, and drops the rows of the second.
    """
    tokens: dict[str, set[str]] = {}
    for adapter in adapters:
        for embedding, row, _ in _tokens(adapter):
            tokens.setdefault(embedding, set()).add(row)
    alike: dict[frozenset[str], str] = {}
    for other in sorted(tokens):
        first = alike.setdefault(frozenset(tokens[other]), other)
        if first != other and not holders[first].keys() & holders[other].keys():
            exclude(
                (holders[first], f"the trained tokens of {first} are those of {other} in"),
                (holders[other], f"the trained tokens of {other} are those of {first} in"),
                "train tokens of one embedding; PEFT may treat the two as tied and drop one",
                on_fault,
            )


def _tokens(adapter: Adapter) -> Iterator[tuple[str, str, FullTensor]]:
    """The trained tokens of an adapter: the embedding, the row, and the values of each."""
    for name, tensor in adapter.tensors.items():
        if tensor.role == "token":
            embedding, _, row = name.partition(_ROWS)
            yield embedding, row, tensor


def _role(tensor: FullTensor) -> str:
    """The properties that must agree; floating dtypes may differ, because they can be averaged."""
    role = _ROLES[tensor.role].format(owner=tensor.owner)
    kind = "float" if "float" in tensor.dtype else tensor.dtype
    return f"{kind} of shape {list(tensor.shape)}, {role}"
