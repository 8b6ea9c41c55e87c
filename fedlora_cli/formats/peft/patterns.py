"""How PEFT matches module names: the same rules, on expressions that nobody trusts.

The expressions come from clients, and Python's own matcher can be made to run for ever by a short
one. So they are matched with a time limit, by a library that has one. That library in turn can be
made to run out of memory, and knows more than Python. So it is given only what Python understands,
and what stays small when it is compiled (`expressions`).
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

import regex

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.expressions import compiled_size
from fedlora_cli.formats.peft.names import endings
from fedlora_cli.remote import Location

#: Seconds for one match, where an honest pattern and name need microseconds; and for all matching
#: of one config, where 4000 patterns and 4000 names need this long.
MATCH_LIMIT = 0.5
TIME_LIMIT = 30.0

#: Characters of an expression; one that names every module of a 405B model has 60 000.
MAX_LENGTH = 100_000

#: What the expressions of one config may come to, as `compiled_size` counts: at about 250 bytes and
#: 6 µs each.
MAX_COMPILED = 2 * MAX_LENGTH

#: The flag under which a repetition could be written with blanks in it.
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")

#: What is plain text to Python, but not to the other library: a brace that begins no count would be
#: a fuzzy match, and colons in a set of characters a class of POSIX.
_BRACE = re.compile(r"\{(?![0-9]+(,[0-9]*)?\}|,[0-9]+\})")
_POSIX = re.compile(r"\[:\^?\w+:\]")

#: How Python's error begins where an expression with `(?i)` stands inside another one.
_FLAGS_INSIDE = "global flags not at the start"


#: What the two libraries raise for an expression; ValueError for a count of thousands of digits.
_UNUSABLE = (re.error, regex.error, RecursionError, MemoryError, OverflowError, ValueError)


@dataclass
class Matcher:
    """Matches the expressions of one file, with one limit on the time of all of them together."""

    where: Location | str
    seconds_left: float = TIME_LIMIT
    stopped: InputError | None = None
    compiled: dict[str, regex.Pattern[str] | Exception] = field(default_factory=dict)
    size_left: int = MAX_COMPILED

    def match(self, pattern: str, text: str, own: str | None = None) -> regex.Match[str] | None:
        """`re.match`. `own` is the expression of the config inside of `pattern`, for the error.

        Raises InputError for what is no expression, too long, or takes too long.
        """
        return self._run(pattern, pattern if own is None else own, text, "match")

    def full(self, pattern: str, text: str) -> bool:
        """Whether `re.fullmatch` finds a match. Raises InputError as `match` does."""
        return self._run(pattern, pattern, text, "fullmatch") is not None

    def _run(
        self, pattern: str, own: str, text: str, method: Literal["match", "fullmatch"]
    ) -> regex.Match[str] | None:
        if self.stopped is not None:
            raise self.stopped
        if len(pattern) > MAX_LENGTH:
            found = f"an expression of {len(pattern)} characters"
            raise InputError(self.where, found, "name the modules in a list")
        began = time.perf_counter()
        try:
            if self.seconds_left <= 0:
                raise TimeoutError
            if pattern not in self.compiled:
                self.compiled[pattern] = self._compile(pattern)
            compiled = self.compiled[pattern]
            if isinstance(compiled, Exception):
                raise compiled
            match = getattr(compiled, method)
            return match(text, timeout=min(self.seconds_left, MATCH_LIMIT))
        except TimeoutError:
            found = f"its expressions take too long, {own[:80]!r} on {text!r} for one"
            self.stopped = InputError(self.where, found, "write them without nested repetition")
            raise self.stopped from None
        except _UNUSABLE as error:
            reason = getattr(error, "msg", None) or str(error)
            found = f"{own[:80]!r} is not a usable regular expression ({reason[:80]})"
            cure = "correct it"
            if reason.startswith(_FLAGS_INSIDE) and own != pattern:
                cure = "PEFT puts it inside of another expression: write (?i:…) in place of (?i)…"
            raise InputError(self.where, found, cure) from None
        finally:
            self.seconds_left -= time.perf_counter() - began

    def _compile(self, pattern: str) -> regex.Pattern[str] | Exception:
        """The expression, or what is wrong with it. Raises InputError where it is one too many."""
        try:
            size = compiled_size(pattern)
            if size > MAX_COMPILED:
                return re.error(f"its repetitions and sets come to {size:.3g} characters")
            self.size_left -= size
            if self.size_left < 0:
                found = f"expressions that come to more than {MAX_COMPILED} characters together"
                self.stopped = InputError(self.where, found, "write names, or fewer expressions")
                raise self.stopped
            return _compiled(pattern)
        except _UNUSABLE as error:
            return error

    def first(self, patterns: Iterable[str], module: str) -> str | None:
        """The first pattern that matches the name or its ending after a dot, as PEFT resolves
        `rank_pattern` and `alpha_pattern`; None if none does. Raises InputError.
        """
        for pattern in patterns:
            if self.match(rf"(.*\.)?({pattern})$", module, pattern) is not None:
                return pattern
        return None


def _compiled(pattern: str) -> regex.Pattern[str]:
    """Raises re.error, regex.error, RecursionError, MemoryError and OverflowError."""
    if any(strange.search(pattern) for strange in (_VERBOSE, _BRACE, _POSIX)):
        raise re.error("neither the flag x, nor braces as text, nor [:…:] are understood")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a later Python will read in another way
        re.compile(pattern)
    return regex.compile(pattern, cache_pattern=False)


@dataclass(frozen=True)
class Targets:
    """The fields of a config that decide which modules are adapted.

    `target` and `exclude` are an expression, a set of names, or None.
    """

    matcher: Matcher
    target: str | frozenset[str] | None
    exclude: str | frozenset[str] | None
    layers: Collection[int] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]

    def match(self, module: str) -> bool:
        """Whether PEFT would adapt a module of that name. Raises InputError.

        A string must match the whole name; a list entry is the name or follows its last dots.
        "all-linear" and null depend on the model, and are believed.
        """
        if self.explicit:
            return self.names(module)
        return not self._is_excluded(module)

    @property
    def explicit(self) -> bool:
        """Whether the config itself names the modules, and does not leave them to the model."""
        return self.target is not None and self.target != "all-linear"

    def names(self, module: str) -> bool:
        """Whether the config itself names a module of that name. Raises InputError."""
        if self.target is None or not self.explicit or self._is_excluded(module):
            return False
        if not self._named(self.target, module):
            return False
        # PEFT looks at layer numbers only for names that a list matches by their ending.
        exact = isinstance(self.target, str) or module in self.target
        return exact or self.layers is None or self._layer(module) in self.layers

    def _is_excluded(self, module: str) -> bool:
        if self.exclude and self._named(self.exclude, module):
            return True
        return any(self._is_saved(name, module) for name in self.saved)

    def _named(self, names: str | frozenset[str], module: str) -> bool:
        if isinstance(names, str):
            return self.matcher.full(names, module)
        return any(ending in names for ending in endings(module))

    def _is_saved(self, name: str, module: str) -> bool:
        return self.matcher.match(rf"(^|.*\.){name}($|\..*)", module, name) is not None

    def _layer(self, module: str) -> int | None:
        """The first number in the name that stands for a layer."""
        # Without a pattern, PEFT wants one more name before the one that precedes the number.
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = self.matcher.match(rf"{start}{pattern}\.(?P<idx>\d+)\.", module, pattern)
            if found is not None:
                return None if found["idx"] is None else int(found["idx"])
        return None
