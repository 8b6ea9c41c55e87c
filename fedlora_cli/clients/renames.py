"""Modules that differ in name alone: what is wrapped around a model changes the names in it.

transformers 4.52 moved `language_model.model.layers` to `model.language_model.layers`, a text model
alone has `model.layers`, and wrappers put words of their own in between. Two names are those of one
module if they end in the same word and have the same numbers in the same order, and if all other
words of the first are in the second, in whatever order, which has at most two adjacent words more.
`encoder.layers` and `decoder.layers` are two modules.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

#: A number in a name: of a layer, an expert, or a token.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])|(?<=\[)\d+(?=\]$)")

#: The words of a name that are looked at; those of deep models have twelve.
_MOST_WORDS = 24

#: The words that a name may have more than the other.
_MOST_MORE = 2


@dataclass(frozen=True)
class Rename:
    """Two names of one module, and who holds modules that are renamed so, by position: `holders[0]`
    under names like `names[0]`, `holders[1]` under names like `names[1]`.
    """

    names: tuple[str, str]
    holders: tuple[frozenset[int], frozenset[int]]


@dataclass(frozen=True)
class _Place:
    """Modules whose names differ in their numbers alone. `examples` are such names and a holder, by
    numbers.
    """

    holders: set[int]
    examples: dict[tuple[str, ...], tuple[str, int]]


def renames(held: Sequence[Mapping[str, T]], look: Callable[[T], object]) -> list[Rename]:
    """Where some hold modules under one name, others under another, and no adapter under both.

    `held` is what every holder has by name; modules that `look` different are different ones. One
    stands for all that differ in the same words; the renames that concern most holders come first.
    """
    groups: dict[frozenset[str], list[int]] = defaultdict(list)
    for position, one in enumerate(held):
        groups[frozenset(one)].append(position)
    if len(groups) < 2:
        return []
    places = _places(groups)
    found: dict[tuple[str, str], list[Rename]] = defaultdict(list)
    # Words in which modules differ that one holder has beside each other.
    distinct: set[tuple[str, str]] = set()
    for pair in _related(places):
        first, second = (places[name] for name in pair)
        if first.holders & second.holders:
            distinct.add(_difference(*pair))
            continue
        for numbers in sorted(first.examples.keys() & second.examples.keys()):
            (name, holder), (other, its) = first.examples[numbers], second.examples[numbers]
            if look(held[holder][name]) == look(held[its][other]):
                sides = (frozenset(first.holders), frozenset(second.holders))
                found[_difference(*pair)].append(Rename((name, other), sides))
                break
    joined = [_joined(several) for words, several in found.items() if words not in distinct]
    return sorted(joined, key=lambda rename: -sum(map(len, rename.holders)))


def _places(groups: Mapping[frozenset[str], Sequence[int]]) -> dict[str, _Place]:
    """All places by their names without numbers. `groups` are holders by the names they have."""
    places: dict[str, _Place] = defaultdict(lambda: _Place(set(), {}))
    known: dict[str, tuple[str, tuple[str, ...]]] = {}
    for names, positions in groups.items():
        own = set()
        for name in sorted(names):
            if name not in known:
                known[name] = (_NUMBER.sub("#", name), tuple(_NUMBER.findall(name)))
                place, numbers = known[name]
                places[place].examples.setdefault(numbers, (name, positions[0]))
            own.add(known[name][0])
        for place in own:
            places[place].holders.update(positions)
    return places


def _related(places: Mapping[str, _Place]) -> Iterator[tuple[str, str]]:
    """Pairs of names that may be those of one place, each pair in one order. Of many names with the
    same words, the one that most hold is compared.
    """
    by_words: dict[tuple[str, ...], str] = {}
    in_order = sorted(places, key=lambda name: (-len(places[name].holders), name))
    for name in in_order:
        by_words.setdefault(_words(name.split(".")), name)
    for name in in_order:
        parts = name.split(".")
        if len(parts) > _MOST_WORDS:
            continue
        for more in range(_MOST_MORE + 1):
            for start in range(len(parts) - more) if more else (0,):
                other = by_words.get(_words(parts[:start] + parts[start + more :]))
                if other is not None and other != name:
                    # Names of as many words have no order of their own.
                    yield (name, other) if more else (min(name, other), max(name, other))


def _words(parts: Sequence[str]) -> tuple[str, ...]:
    """The last word and, sorted, all others."""
    return (parts[-1], *sorted(parts[:-1]))


def _difference(one: str, other: str) -> tuple[str, str]:
    """The words in which two names differ: those that are in their place in both are taken off."""
    first, second = one.split("."), other.split(".")
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    return ".".join(first), ".".join(second)


def _joined(several: Sequence[Rename]) -> Rename:
    """One of these renames with the holders of all."""
    first, second = (
        frozenset().union(*(rename.holders[side] for rename in several)) for side in (0, 1)
    )
    return Rename(several[0].names, (first, second))
