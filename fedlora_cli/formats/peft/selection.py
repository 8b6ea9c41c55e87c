"""The names of modules in a written config: those of the clients' configs, or full names.

transformers renames modules between versions. On load it maps the keys of old adapters, but not
the names in their configs: short names still match, full names do not. Short names also keep the
config of a large model small. PEFT saves every module that a config selects, so a client's config
selects exactly the modules in the client's file, on the base model, too. Its names are therefore
safe if they select, among all known names, exactly the written modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from fedlora_cli.adapters.adapter import Selection
from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.names import EMBEDDINGS, PLAIN, endings
from fedlora_cli.formats.peft.patterns import Matcher, Targets
from fedlora_cli.formats.shared import most_common

T = TypeVar("T")

#: The most selections that are tried, each on all names; clients of one training have few.
_MOST_TRIED = 32


def with_parents(names: Iterable[str]) -> set[str]:
    """The names, and the names of all modules around them.

    >>> sorted(with_parents(["a.b.c"]))
    ['a', 'a.b', 'a.b.c']
    """
    result: set[str] = set()
    for name in names:
        while name and name not in result:
            result.add(name)
            name = name.rpartition(".")[0]
    return result


def selection(
    written: Collection[str], known: Collection[str], offered: Sequence[Selection]
) -> Selection:
    """A selection of exactly the `written` modules among the `known` names.

    It is one of `offered`, the selections of the clients' configs with the most frequent first, or
    a combination of them; if none fits, it has the full names.
    """
    everything = with_parents([*written, *known])
    wanted = set(written)
    for candidate in islice(_candidates(offered, wanted), _MOST_TRIED):
        if candidate.modules and _selected_by(candidate, everything) == wanted:
            return candidate
    return Selection(_full_names(written))


def _candidates(offered: Sequence[Selection], written: Collection[str]) -> Iterator[Selection]:
    """Selections to try: those of clients, and unions of selections that differ only in their
    names or only in their layers.

    An expression is tried only if all clients have the same: every PEFT that loads the adapter
    runs it, so a single client must not choose it.
    """
    if len(offered) == 1 and _has_expression(offered[0]):
        yield offered[0]
    plain = [*_restricted((some for some in offered if not _has_expression(some)), written)]
    yield from plain[:1]
    for field in ("modules", "layers"):
        alike: dict[Selection, list[Selection]] = {}
        for some in plain:
            alike.setdefault(replace(some, **{field: ()}), []).append(some)
        for rest, members in alike.items():
            values = {value for member in members for value in getattr(member, field)}
            if len(members) > 1:
                yield replace(rest, **{field: tuple(sorted(values))})
    yield from plain[1:]


def _restricted(offered: Iterable[Selection], written: Collection[str]) -> Iterator[Selection]:
    """The selections, reduced to the names and layers that occur in the written modules."""
    names = {ending for name in written for ending in endings(name)}
    numbers = {part for name in written for part in name.split(".")}
    for some in offered:
        modules = tuple(name for name in some.modules if name in names)
        layers = tuple(layer for layer in some.layers if str(layer) in numbers)
        # An empty `layers` would select modules of all layers.
        if layers or not some.layers:
            yield replace(some, modules=modules, layers=layers)


def _has_expression(selection: Selection) -> bool:
    if isinstance(selection.modules, str) or isinstance(selection.exclude, str):
        return True
    return not all(map(PLAIN.fullmatch, selection.layers_pattern))


def _selected_by(selection: Selection, everything: Iterable[str]) -> set[str] | None:
    """The names that it selects; None if its expressions cannot be used."""
    modules, exclude = selection.modules, selection.exclude
    targets = Targets(
        matcher=Matcher("target_modules"),
        target=modules if isinstance(modules, str) else frozenset(modules),
        exclude=exclude if isinstance(exclude, str) else frozenset(exclude),
        layers=frozenset(selection.layers) or None,
        layers_pattern=selection.layers_pattern,
        saved=(),
    )
    try:
        return {name for name in everything if targets.names(name)}
    except InputError:
        return None


def _full_names(written: Iterable[str]) -> str | tuple[str, ...]:
    """The full names of the modules, as a list if possible, which every tool understands.

    A list entry also matches longer names that end in it after a dot. That is likely for a name
    without a dot; then the result is an expression, which matches whole names only. It is unlikely
    for other names: the model would have to contain a copy of itself.
    """
    ordered = tuple(sorted(written))
    if all("." in name or name in EMBEDDINGS for name in ordered):
        return ordered
    return "|".join(map(re.escape, ordered))


def modules_to_save(
    owners: Collection[str], known: Collection[str], offered: Sequence[str]
) -> list[str]:
    """`modules_to_save` that selects exactly these owners of full tensors among the known names.

    PEFT selects every module whose name ends in an entry, with or without a dot before it.
    """
    names = tuple({_short(owner, offered) for owner in owners})
    everything = with_parents([*owners, *known])
    selected = {name for name in everything if name.endswith(names)}
    return sorted(names) if selected == set(owners) else sorted(owners)


def token_indices(
    tokens: Mapping[str, Sequence[int]], known: Collection[str], offered: Sequence[str]
) -> dict[str, list[int]]:
    """`trainable_token_indices` for these tokens of each embedding.

    If the base model ties its embeddings, PEFT ignores an entry with the full name of a tied module
    and the same tokens as another entry. So the clients' names are safer than full names.
    """
    everything = with_parents([*tokens, *known])
    together: dict[str, list[str]] = {}
    for name in sorted(tokens):
        together.setdefault(_short(name, offered), []).append(name)
    result: dict[str, list[int]] = {}
    for short, names in together.items():
        alike = len({frozenset(tokens[name]) for name in names}) == 1
        selected = {name for name in everything if name.endswith(short)}
        entries = [short] if alike and selected == set(names) else names
        result |= {entry: sorted(tokens[names[0] if alike else entry]) for entry in entries}
    return result


def _short(name: str, offered: Iterable[str]) -> str:
    """The first of the offered names that is the name or its ending after a dot; else the name."""
    ends = {*endings(name)}
    return next((short for short in offered if short in ends), name)


def patterns(values: Mapping[tuple[str, ...], T]) -> tuple[T, dict[str, T]]:
    r"""The most frequent value, and patterns for the modules with other values: the shortest
    endings of names that determine the value.

    The keys are the parts of the modules' names, which are expressions.

    >>> patterns({("a", "q"): 8, ("b", "q"): 8, ("a", "v"): 4, ("b", "v"): 4, ("b", "o"): 8})
    (8, {'v': 4})
    >>> patterns({("a", "q"): 8, ("b", "q"): 4, ("q",): 8})
    (8, {'b\\.q': 4})
    """
    default = most_common(values)
    result: dict[str, T] = {}
    groups: list[tuple[int, list[tuple[str, ...]]]] = [(0, sorted(values))]
    while groups:
        depth, names = groups.pop()
        distinct = {values[name] for name in names}
        if distinct == {default}:
            continue
        if len(distinct) == 1 and depth:
            result[r"\.".join(names[0][-depth:])] = values[names[0]]
            continue
        deeper: dict[str, list[tuple[str, ...]]] = {}
        for name in names:
            if len(name) > depth:
                deeper.setdefault(name[-depth - 1], []).append(name)
            elif values[name] != default:  # other names end in this whole name
                result["^" + r"\.".join(name)] = values[name]
        groups += [(depth + 1, some) for some in deeper.values()]
    return default, dict(sorted(result.items()))
