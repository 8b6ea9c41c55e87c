"""The key of a `rank_pattern` or `alpha_pattern` that applies to a module: the first match.

A large adapter has thousands of keys, nearly all of them names. Names are looked up in a table;
only expressions are matched one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedlora_cli.formats.peft.names import endings
from fedlora_cli.formats.peft.patterns import Matcher

#: A key that is a name. In it an unescaped dot matches any character, as in an expression.
_NAME = re.compile(r"(\^?)((?:[\w:-]|\.|\\[.:+-])+)\$?", re.ASCII)

#: The most arrangements of dots in names: all layers and experts of known models have a hundred.
#: A module is looked up once per arrangement; further names are matched as expressions.
_MOST_ARRANGEMENTS = 1_000


@dataclass(frozen=True)
class Keys:
    """The keys of one field in their order. `names` has the positions of the keys that are names:
    by a leading `^` and by length, then by the places of unescaped dots, then by text.
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
        result = cls(matcher, tuple(keys))
        arrangements = 0
        for position, key in enumerate(result.keys):
            name = _NAME.fullmatch(key)
            if name is None or arrangements >= _MOST_ARRANGEMENTS:
                result.expressions.append(position)
                continue
            # A comma marks an escaped dot, so that the dots that are left are unescaped.
            text = re.sub(r"\\(.)", lambda char: "," if char[1] == "." else char[1], name[2])
            dots = tuple(at for at, character in enumerate(text) if character == ".")
            by_dots = result.names.setdefault((bool(name[1]), len(text)), {})
            arrangements += dots not in by_dots
            by_dots.setdefault(dots, {}).setdefault(text.replace(",", "."), position)
        return result

    def first(self, module: str) -> str | None:
        """The first key that matches the module's name, or its ending after a dot, as in PEFT; None
        without a match. Raises InputError.
        """
        named = min(self._positions(module), default=len(self.keys))
        for key in (self.keys[at] for at in self.expressions if at < named):
            if self.matcher.match(rf"(.*\.)?({key})$", module, key) is not None:
                return key
        return self.keys[named] if named < len(self.keys) else None

    def _positions(self, module: str) -> Iterator[int]:
        """The positions of the keys that are this name or an ending of it."""
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
