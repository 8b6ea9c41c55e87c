"""Whether adapters fit each other: what can be averaged is of one model and trained one way.

Where they disagree, those are at fault that differ from a strict majority of the adapters that say
something about it. Where there is none, nobody is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedlora_cli.adapters.adapter import Adapter, FullTensor, Module, Role
from fedlora_cli.clients.renames import renames
from fedlora_cli.errors import FaultHandler, InputError
from fedlora_cli.remote import Location

T = TypeVar("T")

#: Facts that change what the tensors mean.
_MEANINGS = (
    "bias",
    "lora_bias",
    "dora",
    "layer_replication",
    "invocation_tokens",
)

#: Facts about how tools name and store the same things.
_STYLES = ("key_prefix", "alpha_source")

#: What a tensor is called in an error.
_ROLES: dict[Role, str] = {
    "saved": "trained as {owner}",
    "base": "a base weight",
    "bias": "a trained bias",
    "token": "a trained token",
    "magnitude": "magnitudes of DoRA",
    "lora_bias": "a bias on lora_B",
}


class Undecided(InputError):
    """Adapters disagree, and neither way is that of most: where it is told is a text, as it is not
    known who is at fault.
    """


@dataclass(frozen=True)
class Majority(Generic[T]):
    """What most adapters say, and the first that says it. It decides who is at fault if these are
    more than half of those that say something.
    """

    value: T
    example: Adapter
    decides: bool

    def fault(self, place: Location, found: str, cure: str) -> InputError:
        """The error of one that says something else; what was found may name the example."""
        return fault_for(place, found, cure, self.example, decided=self.decides)


def fault_for(
    place: Location, found: str, cure: str, example: Adapter, *, decided: bool
) -> InputError:
    places: dict[Location, str | None] = {example.path: None}
    if decided:
        return InputError(place, found, cure, places)
    return Undecided(str(place), found, cure, places)


#: What PEFT puts around an embedding of which it trains some rows.
_ROWS = ".token_adapter."

_ONE_MODEL = "give all clients the same model and the same modules_to_save"
_ONE_WAY = "train it one way everywhere"


def check_compatibility(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Whether what these adapters hold can be one model's."""
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
    """One format of all adapters; one that has nothing left in it has faults of its own."""
    formats = [(one.format, one) for one in adapters if one.modules or one.tensors]
    if not formats:
        return
    most = majority(formats)
    for format_, adapter in formats:
        if format_ != most.value:
            found = f"in the format {format_}, but {most.example.path} is in {most.value}"
            cure = "give adapters of one format: the names of their modules differ"
            on_fault(most.fault(adapter.path, found, cure))


def majority(values: Sequence[tuple[T, Adapter]]) -> Majority[T]:
    """What most adapters say: the others are those that do not fit."""
    most, votes = Counter(value for value, _ in values).most_common(1)[0]
    example = next(adapter for value, adapter in values if value == most)
    return Majority(most, example, decides=2 * votes > len(values))


def _check_usual(
    said: dict[str, list[tuple[str, Adapter]]],
    cure: str,
    on_fault: FaultHandler,
    note: Callable[[str, str], str] = lambda one, other: "",
) -> None:
    """One description of everything that is described by name; `note` on two that differ."""
    for name, values in said.items():
        most = majority(values)
        for described, adapter in values:
            if described != most.value:
                found = f"{name} is {described}, but {most.value} in {most.example.path}"
                found += note(described, most.value)
                on_fault(most.fault(adapter.weights_file, found, cure))


def _check_names(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """No module has one name in some adapters and another name in others: each would be averaged as
    if the others lacked it.
    """
    held: list[dict[str, Module | FullTensor]] = [{**a.modules, **a.tensors} for a in adapters]
    for rename in renames(held, _look):
        one, other = rename.names
        holders = [[adapters[i] for i in sorted(side)] for side in rename.holders]
        exclude(
            (holders[0], f"{one} is the same module as {other} in"),
            (holders[1], f"{other} is the same module as {one} in"),
            "train all clients on one version of transformers, and wrap the model in one way",
            on_fault,
        )


def _look(one: Module | FullTensor) -> object:
    """What is the same under whatever name."""
    return _describe(one) if isinstance(one, Module) else (one.role, one.shape)


def _check_modules(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """One shape and one layout of every module in all adapters."""
    said: dict[str, list[tuple[str, Adapter]]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            said.setdefault(name, []).append((_describe(module), adapter))
    _check_usual(said, "leave out the adapters of another base model", on_fault, _transposes)


def _describe(module: Module) -> str:
    layout = module.layout
    text = f"{layout.kind} {module.shape[0]} x {module.shape[1]}"
    if layout.sides:
        text += f" of kernel {' x '.join(map(str, layout.sides[1:]))}"
    if layout.kind == "experts":
        # Of what is nested around one module, the names of the pairs do not tell which is which.
        text += f", one of {layout.experts}, of {' and '.join(layout.parameters)}"
    return text


def _transposes(one: str, other: str) -> str:
    """A remark on two descriptions of fused experts whose sides are exchanged."""
    mine, others = (re.fullmatch(r"experts (\d+) x (\d+)(.*)", text) for text in (one, other))
    if mine is None or others is None or mine.groups() != (others[2], others[1], others[3]):
        return ""
    return ", its transpose, as PEFT before 0.19 stored experts"


def _check_experts(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
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
        exclude(
            (list(single), f"{example} is one expert, where all of {owner} are in one in"),
            (together[owner], f"all of {owner} are in one, where {example} is one expert in"),
            "train all clients with one version of transformers, 4 or 5",
            on_fault,
        )


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The names of the modules that one lies in, outermost first, and its own name in each.

    >>> list(_splits("a.b.c"))
    [('a', 'b.c'), ('a.b', 'c')]
    """
    for at, character in enumerate(name):
        if character == ".":
            yield name[:at], name[at + 1 :]


def exclude(
    one: tuple[Sequence[Adapter], str],
    other: tuple[Sequence[Adapter], str],
    cure: str,
    on_fault: FaultHandler,
) -> None:
    """Two ways that exclude each other, with what to say to those that took each: who took both is
    at fault, and so are the fewer of the rest. If these are as many, nobody is.
    """
    both = set(one[0]) & set(other[0])
    for adapter in (adapter for adapter in one[0] if adapter in both):
        found = f"{one[1]} {adapter.path}"
        on_fault(InputError(adapter.weights_file, found, cure, {adapter.path: None}))
    ways = [
        ([adapter for adapter in way if adapter not in both], found) for way, found in (one, other)
    ]
    (blamed, found), (others, _) = sorted(ways, key=lambda way: len(way[0]))
    decided = len(blamed) < len(others)
    for adapter in blamed:
        text = f"{found} {others[0].path}"
        on_fault(fault_for(adapter.weights_file, text, cure, others[0], decided=decided))


def _check_tensors(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Tensors of one shape and role everywhere, no module trained in two ways, and biases in all
    adapters or none.
    """
    said: dict[str, list[tuple[str, Adapter]]] = {}
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            said.setdefault(name, []).append((_role(tensor), adapter))
    _check_usual(said, _ONE_MODEL, on_fault)
    for name, values in said.items():
        holders = [adapter for _, adapter in values]
        if holders[0].tensors[name].role != "bias":
            continue
        lacking = [adapter for adapter in adapters if name not in adapter.tensors]
        if lacking:
            exclude(
                (lacking, f"no {name}, which is trained in"),
                (holders, f"{name} is trained, which is not in"),
                "train the same biases everywhere; the base model's are not known here",
                on_fault,
            )
    _check_saved(adapters, on_fault)
    _check_tokens(adapters, on_fault)


def _check_saved(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
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
        exclude(
            (savers[owner], f"{module} is saved in full, but has LoRA factors in"),
            (list(holders), f"{module} has LoRA factors, but is saved in full in"),
            _ONE_WAY,
            on_fault,
        )


def _check_tokens(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """Rows of one embedding that were trained as tokens have one width, whichever tokens they are,
    and the embedding is trained in no other way: PEFT 0.21 would not load that.
    """
    rows: dict[str, list[tuple[str, Adapter]]] = {}
    for adapter in adapters:
        tokens = [name for name, tensor in adapter.tensors.items() if tensor.role == "token"]
        # All rows of one embedding in one adapter are of one tensor.
        for embedding, name in {name.partition(_ROWS)[0]: name for name in tokens}.items():
            rows.setdefault(embedding, []).append((_role(adapter.tensors[name]), adapter))
    _check_usual(rows, _ONE_MODEL, on_fault)
    for embedding, values in rows.items():
        holders = [adapter for _, adapter in values]
        # Where one client did both, PEFT has the embedding itself below the rows, by another name.
        saved = [one for one in adapters if _is_saved(one.tensors.get(f"{embedding}.weight"))]
        factored = [one for one in adapters if embedding in one.modules]
        for others, way in ((factored, "has LoRA factors"), (saved, "is saved in full")):
            if others:
                exclude(
                    (others, f"{embedding} {way}, but has trained tokens in"),
                    (holders, f"{embedding} has trained tokens, but {way} in"),
                    _ONE_WAY,
                    on_fault,
                )
    _check_same_tokens(adapters, on_fault)


def _check_same_tokens(adapters: Sequence[Adapter], on_fault: FaultHandler) -> None:
    """No two embeddings with the same tokens that no adapter trained together.

    PEFT takes such entries for one where the base model ties its embeddings, which files do not
    tell, and drops the rows of the second.
    """
    tokens: dict[str, set[str]] = {}
    holders: dict[str, dict[Adapter, None]] = {}
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            if tensor.role == "token":
                embedding, _, row = name.partition(_ROWS)
                tokens.setdefault(embedding, set()).add(row)
                holders.setdefault(embedding, {})[adapter] = None
    alike: dict[frozenset[str], str] = {}
    for other in sorted(tokens):
        one = alike.setdefault(frozenset(tokens[other]), other)
        if one != other and not holders[one].keys() & holders[other].keys():
            exclude(
                (list(holders[one]), f"the trained tokens of {one} are those of {other} in"),
                (list(holders[other]), f"the trained tokens of {other} are those of {one} in"),
                "train tokens of one embedding; PEFT may take the two for tied, and drop one",
                on_fault,
            )


def _is_saved(tensor: FullTensor | None) -> bool:
    return tensor is not None and tensor.role == "saved"


def _role(tensor: FullTensor) -> str:
    """What must be the same everywhere; floating dtypes may differ, as they can be averaged."""
    role = _ROLES[tensor.role].format(owner=tensor.owner)
    kind = "float" if "float" in tensor.dtype else tensor.dtype
    return f"{kind} of shape {list(tensor.shape)}, {role}"


def agreed(adapters: Sequence[Adapter], name: str, cure: str, on_fault: FaultHandler) -> Any:
    """The one value of a fact; adapters that do not say are not asked."""
    said = [(getattr(a.facts, name), a) for a in adapters if getattr(a.facts, name) is not None]
    if not said:
        return None
    most = majority(said)
    for value, adapter in said:
        if value != most.value:
            label = name.replace("_", " ")
            verb = "are" if isinstance(value, tuple) and label.endswith("s") else "is"
            found = (
                f"its {label} {verb} {_text(value)}, but {_text(most.value)} in {most.example.path}"
            )
            on_fault(most.fault(adapter.path, found, cure))
    return most.value


def _text(value: Any) -> str:
    """A fact in an error."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))[:200] or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)[:200]
