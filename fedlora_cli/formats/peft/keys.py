"""Which key of a `rank_pattern` or `alpha_pattern` counts for a module: the first that matches.

Nearly all keys are names, and a large adapter has thousands of them. Names are looked up; only what
is an expression is matched, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedlora_cli.formats.peft.names import endings
from fedlora_cli.formats.peft.patterns import Matcher

#: A name as an expression: an unescaped dot is any character.
_NAME = re.compile(r"(\^?)((?:[\w:-]|\.|\\[.:+-])+)\$?", re.ASCII)

#: Where the dots of a name are, so many different ways: all layers and experts of known models have
#: a hundred. A module is looked up once for each; names beyond are matched as expressions.
_MOST_WAYS = 1_000


@dataclass(frozen=True)
class Keys:
    """The keys of one field in their order. `names` are the positions of those that are names: by
    whether a key begins with `^` and by its length, then by where it has unescaped dots.
    """

    matcher: Matcher
    keys: tuple[str, ...]
    names: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, int]]] = field(
        default_factory=dict
    )
    expressions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, matcher: Matcher, keys: Iterable[str]) -> Keys:
        """The keys, sorted into names and expressions."""
        found = cls(matcher, tuple(keys))
        ways = 0
        for position, key in enumerate(found.keys):
            name = _NAME.fullmatch(key)
            if name is None or ways >= _MOST_WAYS:
                found.expressions.append(position)
                continue
            # What is escaped stands for itself, so that only unescaped dots are left.
            text = re.sub(r"\\(.)", lambda one: "," if one[1] == "." else one[1], name[2])
            dots = tuple(at for at, character in enumerate(text) if character == ".")
            alike = found.names.setdefault((bool(name[1]), len(text)), {})
            ways += dots not in alike
            alike.setdefault(dots, {}).setdefault(text.replace(",", "."), position)
        return found

    def first(self, module: str) -> str | None:
        """The first key that matches the module's name, or its ending after a dot, as in PEFT; None
        if none does. Raises InputError.
        """
        named = min(self._positions(module), default=len(self.keys))
        for position in self.expressions:
            if position > named:
                break
            if self.matcher.first(self.keys[position : position + 1], module) is not None:
                return self.keys[position]
        return self.keys[named] if named < len(self.keys) else None

    def _positions(self, module: str) -> Iterator[int]:
        """The positions of the keys that are this name, or an ending of it."""
        for ending in endings(module):
            for anchored in (True, False) if ending == module else (False,):
                for dots, names in self.names.get((anchored, len(ending)), {}).items():
                    position = names.get(_dotted(ending, dots))
                    if position is not None:
                        yield position


def _dotted(text: str, dots: Iterable[int]) -> str:
    """The text with a dot at each of these places.

    >>> _dotted("layers_0.q", (6, 8))
    'layers.0.q'
    """
    characters = list(text)
    for at in dots:
        characters[at] = "."
    return "".join(characters)
