"""How a written config names its modules: as the clients' configs did, or by full names.

transformers renames modules between versions and maps the keys of old adapters on load, but not
the names in their configs. Short names survive that, full names do not. They also keep the config
of a large model small. A client's config selects exactly the modules in the client's file, on the
base model as well, because PEFT saves every module that the config selects. So names that a client
used are safe wherever they select, among all known names, exactly what is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from fedlora_cli.adapters.adapter import Selection
from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.names import EMBEDDINGS, PLAIN, endings
from fedlora_cli.formats.peft.patterns import Matcher, Targets

T = TypeVar("T")

#: The most selections that are tried, as each is held against all names; a federation has few.
_MOST_TRIED = 32


def with_parents(names: Iterable[str]) -> set[str]:
    """The names with those of all modules around them.

    >>> sorted(with_parents(["a.b.c"]))
    ['a', 'a.b', 'a.b.c']
    """
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def selection(
    written: Collection[str], known: Collection[str], offered: Sequence[Selection]
) -> Selection:
    """What selects exactly the `written` modules among the `known` names.

    `offered` are the selections of the clients' configs, the most frequent first. Without a
    selection that fits, the modules have their full names.
    """
    everything = with_parents([*written, *known])
    wanted = set(written)
    for one in islice(_candidates(offered, wanted), _MOST_TRIED):
        if one.modules and _selected_by(one, everything) == wanted:
            return one
    return Selection(_full_names(written))


def _candidates(offered: Sequence[Selection], written: Collection[str]) -> Iterator[Selection]:
    """Selections that are safe to write if they select what is written: those of clients, and of
    clients together that differ in their names alone or in their layers alone.

    An expression is taken only where all clients have the same one: PEFT runs it, and one client
    must not choose what everybody runs.
    """
    if len(offered) == 1 and _has_expression(offered[0]):
        yield offered[0]
    plain = list(_useful((one for one in offered if not _has_expression(one)), written))
    yield from plain[:1]
    for field in ("modules", "layers"):
        alike: dict[Selection, list[Selection]] = {}
        for one in plain:
            alike.setdefault(replace(one, **{field: ()}), []).append(one)
        for rest, members in alike.items():
            values = {value for one in members for value in getattr(one, field)}
            if len(members) > 1:
                yield replace(rest, **{field: tuple(sorted(values))})
    yield from plain[1:]


def _useful(offered: Iterable[Selection], written: Collection[str]) -> Iterator[Selection]:
    """The selections with those of their names and layers alone that occur in written modules."""
    names = {ending for name in written for ending in endings(name)}
    numbers = {part for name in written for part in name.split(".")}
    for one in offered:
        modules = tuple(name for name in one.modules if name in names)
        layers = tuple(layer for layer in one.layers if str(layer) in numbers)
        # Without any of its layers, it would select modules of all layers.
        if layers or not one.layers:
            yield replace(one, modules=modules, layers=layers)


def _has_expression(one: Selection) -> bool:
    patterns_of_layers = not all(map(PLAIN.fullmatch, one.layers_pattern))
    return isinstance(one.modules, str) or isinstance(one.exclude, str) or patterns_of_layers


def _selected_by(one: Selection, everything: Iterable[str]) -> set[str] | None:
    targets = Targets(
        matcher=Matcher("target_modules"),
        target=one.modules if isinstance(one.modules, str) else frozenset(one.modules),
        exclude=one.exclude if isinstance(one.exclude, str) else frozenset(one.exclude),
        layers=frozenset(one.layers) or None,
        layers_pattern=one.layers_pattern,
        saved=(),
    )
    try:
        return {name for name in everything if targets.names(name)}
    except InputError:
        return None


def _full_names(written: Iterable[str]) -> str | tuple[str, ...]:
    """The modules by their full names, which every tool understands.

    An entry of a list also matches every name that ends in it after a dot. For a full name that
    takes a model that holds a copy of itself. For a name without a dot it is likely, and then an
    expression is written, which matches whole names only.
    """
    ordered = tuple(sorted(written))
    if all("." in name or name in EMBEDDINGS for name in ordered):
        return ordered
    return "|".join(map(re.escape, ordered))


def modules_to_save(
    owners: Collection[str], known: Collection[str], offered: Sequence[str]
) -> list[str]:
    """`modules_to_save` that selects exactly these owners of full tensors among the known names.

    PEFT takes every module whose name ends in an entry, with or without a dot before it.
    """
    names = tuple({_named(owner, offered) for owner in owners})
    everything = with_parents([*owners, *known])
    selected = {one for one in everything if one.endswith(names)}
    return sorted(names) if selected == set(owners) else sorted(owners)


def token_indices(
    tokens: Mapping[str, Sequence[int]], known: Collection[str], offered: Sequence[str]
) -> dict[str, list[int]]:
    """`trainable_token_indices` for these tokens of each embedding.

    Where the base model ties its embeddings, PEFT passes over an entry with the full name of a tied
    module and the tokens of another entry. So the names of clients are safer than full names.
    """
    everything = with_parents([*tokens, *known])
    together: dict[str, list[str]] = {}
    for name in sorted(tokens):
        together.setdefault(_named(name, offered), []).append(name)
    result: dict[str, list[int]] = {}
    for short, names in together.items():
        alike = len({frozenset(tokens[name]) for name in names}) == 1
        selected = {one for one in everything if one.endswith(short)}
        entries = [short] if alike and selected == set(names) else names
        result |= {entry: sorted(tokens[names[0] if alike else entry]) for entry in entries}
    return result


def _named(name: str, offered: Iterable[str]) -> str:
    """The first that is offered of the name's endings after a dot, or the name."""
    own = {*endings(name)}
    return next((one for one in offered if one in own), name)


def patterns(values: Mapping[tuple[str, ...], T]) -> tuple[T, dict[str, T]]:
    r"""The value that most modules have, and patterns for the others: the shortest endings that
    only modules of one value have.

    A module is given by the parts of its name, which are expressions.

    >>> patterns({("a", "q"): 8, ("b", "q"): 8, ("a", "v"): 4, ("b", "v"): 4, ("b", "o"): 8})
    (8, {'v': 4})
    >>> patterns({("a", "q"): 8, ("b", "q"): 4, ("q",): 8})
    (8, {'b\\.q': 4})
    """
    usual = Counter(values[name] for name in sorted(values)).most_common(1)[0][0]
    found: dict[str, T] = {}
    groups: list[tuple[int, list[tuple[str, ...]]]] = [(0, sorted(values))]
    while groups:
        depth, names = groups.pop()
        distinct = {values[name] for name in names}
        if distinct == {usual}:
            continue
        if len(distinct) == 1 and depth:
            found[r"\.".join(names[0][-depth:])] = values[names[0]]
            continue
        deeper: dict[str, list[tuple[str, ...]]] = {}
        for name in names:
            if len(name) > depth:
                deeper.setdefault(name[-depth - 1], []).append(name)
            elif values[name] != usual:  # the ending of others is its whole name
                found["^" + r"\.".join(name)] = values[name]
        groups += [(depth + 1, some) for some in deeper.values()]
    return usual, dict(sorted(found.items()))
