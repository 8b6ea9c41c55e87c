"""How PEFT matches module names: the same rules, on expressions that nobody trusts.

The expressions come from clients, and Python's own matcher can be made to run for ever by a short
one. So they are matched with a time limit, by a library that has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import regex

from fedlora_cli.errors import InputError

#: Seconds that matching one name may take. An honest pattern needs microseconds.
TIME_LIMIT = 1.0

#: Characters of an expression. PEFT's own lists of exact names stay far below.
MAX_LENGTH = 10_000


@dataclass(frozen=True)
class Targets:
    """The fields of a config that decide which modules are adapted.

    `target` and `exclude` are an expression, a set of names, or None.
    """

    where: Path
    target: str | frozenset[str] | None
    exclude: str | frozenset[str] | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]

    def match(self, module: str) -> bool:
        """Whether PEFT would adapt a module of that name. Raises InputError.

        A string must match the whole name; a list entry is the name or follows its last dots.
        "all-linear" and null depend on the model, and are believed.
        """
        if self.exclude and self._named(self.exclude, module):
            return False
        if any(self._full(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self.target is None or self.target == "all-linear":
            return True
        if not self._named(self.target, module):
            return False
        # PEFT looks at layer numbers only for names that a list matches by their ending.
        exact = isinstance(self.target, str) or module in self.target
        return exact or self.layers is None or self._layer(module) in self.layers

    def _named(self, names: str | frozenset[str], module: str) -> bool:
        if isinstance(names, str):
            return self._full(names, module)
        parts = module.split(".")
        return any(".".join(parts[start:]) in names for start in range(len(parts)))

    def _full(self, pattern: str, module: str) -> bool:
        return matches(rf"(?:{pattern})\Z", module, where=self.where) is not None

    def _layer(self, module: str) -> int | None:
        """The first number in the name that stands for a layer."""
        # Without a pattern, PEFT wants one more name before the one that precedes the number.
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = matches(rf"{start}{pattern}\.(?P<idx>\d+)\.", module, where=self.where)
            if found is not None:
                return int(found["idx"])
        return None


def first_match(patterns: Iterable[str], module: str, *, where: Path) -> str | None:
    """The first pattern that matches the name or its ending after a dot, as PEFT resolves
    `rank_pattern` and `alpha_pattern`; None if none does. Raises InputError.
    """
    for pattern in patterns:
        if matches(rf"(.*\.)?({pattern})$", module, where=where) is not None:
            return pattern
    return None


def matches(pattern: str, text: str, *, where: Path) -> regex.Match[str] | None:
    """`re.match` with a limit on time and length. Raises InputError."""
    if len(pattern) > MAX_LENGTH:
        found = f"an expression of {len(pattern)} characters"
        raise InputError(where, found, "name the modules in a list")
    try:
        return _compiled(pattern).match(text, timeout=TIME_LIMIT)
    except regex.error as error:
        found = f"{pattern[:80]!r} is not a regular expression ({error})"
        raise InputError(where, found, "correct it") from None
    except TimeoutError:
        found = f"the expression {pattern[:80]!r} does not end on {text!r}"
        raise InputError(where, found, "write it without nested repetition") from None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
