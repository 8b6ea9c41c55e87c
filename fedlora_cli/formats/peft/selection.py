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
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.names import EMBEDDINGS, endings
from fedlora_cli.formats.peft.patterns import Matcher

T = TypeVar("T")

#: What a config that selects modules gives: names, or an expression.
Selection = str | tuple[str, ...]

#: A name that PEFT may put into an expression of its own: it has no meaning there but itself.
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


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


def target_modules(
    written: Collection[str], known: Collection[str], offered: Sequence[Selection]
) -> list[str] | str:
    """`target_modules` that selects exactly the `written` modules among the `known` names.

    `offered` are the selections of the clients' configs, the most frequent first. A list matches a
    name, or its ending after a dot. An expression is taken only where all clients have the same
    one: PEFT runs it, and one client must not choose what everybody runs. Without a selection that
    fits, the modules have their full names.
    """
    everything = with_parents([*written, *known])
    wanted = set(written)
    if len(offered) == 1 and isinstance(offered[0], str):
        if _selected_by(offered[0], everything) == wanted:
            return offered[0]
        return _full_names(written)
    lists = [_used(names, wanted) for names in offered if not isinstance(names, str)]
    for names in (*lists, set().union(*lists)):
        if names and _ending_in(names, everything) == wanted:
            return sorted(names)
    return _full_names(written)


def _used(names: Iterable[str], written: Iterable[str]) -> set[str]:
    """The names that select at least one of the written modules."""
    useful = {ending for name in written for ending in endings(name)}
    return useful.intersection(names)


def _ending_in(names: Collection[str], everything: Iterable[str]) -> set[str]:
    return {one for one in everything if any(ending in names for ending in endings(one))}


def _selected_by(expression: str, everything: Iterable[str]) -> set[str] | None:
    matcher = Matcher("target_modules")
    try:
        return {one for one in everything if matcher.full(expression, one)}
    except InputError:
        return None


def _full_names(written: Iterable[str]) -> list[str] | str:
    """The modules by their full names, which every tool understands.

    An entry of a list also matches every name that ends in it after a dot. For a full name that
    takes a model that holds a copy of itself. For a name without a dot it is likely, and then an
    expression is written, which matches whole names only.
    """
    ordered = sorted(written)
    if all("." in name or name in EMBEDDINGS for name in ordered):
        return ordered
    return "|".join(map(re.escape, ordered))


def modules_to_save(
    owners: Collection[str], known: Collection[str], offered: Collection[str]
) -> list[str]:
    """`modules_to_save` that selects exactly these owners of full tensors among the known names.

    PEFT takes every module whose name ends in an entry, with or without a dot before it.
    """
    everything = with_parents([*owners, *known])
    names = [name for name in offered if _PLAIN.fullmatch(name)]
    names = [name for name in names if any(owner.endswith(name) for owner in owners)]
    selected = {one for one in everything if one.endswith(tuple(names))}
    return sorted(names) if selected == set(owners) else sorted(owners)


def token_indices(
    tokens: Mapping[str, Sequence[int]], offered: Collection[str]
) -> dict[str, list[int]]:
    """`trainable_token_indices` for these tokens of each embedding.

    PEFT takes two entries with the same tokens for tied weights, where the base model ties its
    embeddings, and passes over the second. So embeddings that clients trained under one name have
    one entry.
    """
    result: dict[str, list[int]] = {}
    left = {name: sorted(own) for name, own in tokens.items()}
    for short in sorted(offered, key=lambda name: (-len(name), name)):
        together = [name for name in left if name.endswith(short)]
        if not short or len(together) < 2 or len({tuple(left[name]) for name in together}) > 1:
            continue
        result[short] = left[together[0]]
        left = {name: own for name, own in left.items() if name not in together}
    return result | left


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
