"""Modules with different names in different adapters: wrappers of a model change the names in it.

transformers 4.52 moved `language_model.model.layers` to `model.language_model.layers`, a text model
alone has `model.layers`, and wrappers insert words. Two names belong to one module if

- they end in the same word and have the same numbers in the same order, and
- the second has all other words of the first, in any order, and at most two adjacent words more.

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

#: Names with more words are skipped; deep models have names of twelve words.
_MOST_WORDS = 24

#: The number of words that a name may have more than the other.
_MOST_MORE = 2


@dataclass(frozen=True)
class Rename:
    """Two names of one module, and the positions of the adapters with names like each of them."""

    names: tuple[str, str]
    holders: tuple[frozenset[int], frozenset[int]]


@dataclass(frozen=True)
class _Place:
    """Modules whose names differ only in numbers; `examples` are a name and a holder by numbers."""

    holders: set[int]
    examples: dict[tuple[str, ...], tuple[str, int]]


def renames(contents: Sequence[Mapping[str, T]], kind: Callable[[T], object]) -> list[Rename]:
    """The modules that some adapters have under one name, and others under another.

    `contents` are the modules of each adapter by name; modules of another `kind` are different.
    No adapter has both names. One rename stands for all with the same changed words; the most
    frequent come first.
    """
    groups: dict[frozenset[str], list[int]] = defaultdict(list)
    for position, modules in enumerate(contents):
        groups[frozenset(modules)].append(position)
    if len(groups) < 2:
        return []
    places = _places(groups)
    by_words: dict[tuple[str, str], list[Rename]] = defaultdict(list)
    # Changed words between two modules of one adapter: these are two modules everywhere.
    distinct: set[tuple[str, str]] = set()
    for pair in _related(places):
        first, second = (places[name] for name in pair)
        if first.holders & second.holders:
            distinct.add(_difference(*pair))
            continue
        for numbers in sorted(first.examples.keys() & second.examples.keys()):
            (name, i), (other, j) = first.examples[numbers], second.examples[numbers]
            if kind(contents[i][name]) == kind(contents[j][other]):
                sides = (frozenset(first.holders), frozenset(second.holders))
                by_words[_difference(*pair)].append(Rename((name, other), sides))
                break
    joined = [_joined(several) for words, several in by_words.items() if words not in distinct]
    return sorted(joined, key=lambda rename: -sum(map(len, rename.holders)))


def _places(groups: Mapping[frozenset[str], Sequence[int]]) -> dict[str, _Place]:
    """All places by their names without numbers. `groups` are the holders by their set of names."""
    places: dict[str, _Place] = defaultdict(lambda: _Place(set(), {}))
    known: dict[str, tuple[str, tuple[str, ...]]] = {}
    for names, positions in groups.items():
        places_here = set()
        for name in sorted(names):
            if name not in known:
                known[name] = (_NUMBER.sub("#", name), tuple(_NUMBER.findall(name)))
                place, numbers = known[name]
                places[place].examples.setdefault(numbers, (name, positions[0]))
            places_here.add(known[name][0])
        for place in places_here:
            places[place].holders.update(positions)
    return places


def _related(places: Mapping[str, _Place]) -> Iterator[tuple[str, str]]:
    """Pairs of names that may belong to one place. Of names with the same words, only the most
    frequent is compared.
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
                    # Names with equally many words are sorted, so that a pair has one order.
                    yield (name, other) if more else (min(name, other), max(name, other))


def _words(parts: Sequence[str]) -> tuple[str, ...]:
    """The last word, then all others sorted."""
    return (parts[-1], *sorted(parts[:-1]))


def _difference(name: str, other: str) -> tuple[str, str]:
    """The differing words of two names, without the common beginning and end."""
    first, second = name.split("."), other.split(".")
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    return ".".join(first), ".".join(second)


def _joined(several: Sequence[Rename]) -> Rename:
    """The first rename, with the holders of all."""
    first, second = (
        frozenset().union(*(rename.holders[side] for rename in several)) for side in (0, 1)
    )
    return Rename(several[0].names, (first, second))
