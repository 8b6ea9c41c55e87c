"""PEFT's rules for matching module names, safe for expressions from untrusted clients.

A short expression can make Python's `re` run forever. So `regex` matches the expressions, with a
time limit. Since `regex` can run out of memory and accepts more syntax than Python, it gets only
expressions that Python accepts and that stay small when compiled (`expressions`).
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import regex

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.expressions import compiled_size
from fedlora_cli.formats.peft.names import endings
from fedlora_cli.remote import Location

#: Seconds for one match, which normally takes microseconds, and for all matches of one config:
#: 4000 patterns and 4000 names take this long.
MATCH_LIMIT = 0.5
TIME_LIMIT = 30.0

#: The most characters of an expression; the names of all modules of a 405B model have 60 000.
MAX_LENGTH = 100_000

#: The largest total of `compiled_size` in one config; each unit takes about 250 bytes and 6 µs.
MAX_COMPILED = 2 * MAX_LENGTH

#: The flag x, which allows blanks inside a repetition.
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")

#: Plain text to Python but not to `regex`: a brace that begins no count is a fuzzy match, and
#: colons in a set of characters are a POSIX class.
_BRACE = re.compile(r"\{(?![0-9]+(,[0-9]*)?\}|,[0-9]+\})")
_POSIX = re.compile(r"\[:\^?\w+:\]")

#: The beginning of Python's error for an expression with `(?i)` inside another expression.
_FLAGS_INSIDE = "global flags not at the start"

#: The errors of both libraries for bad expressions; ValueError for a count of thousands of digits.
_UNUSABLE = (re.error, regex.error, RecursionError, MemoryError, OverflowError, ValueError)


@dataclass
class Matcher:
    """Matches the expressions of one file, with limits on their total time and size."""

    where: Location | str
    seconds_left: float = TIME_LIMIT
    stopped: InputError | None = None
    compiled: dict[str, regex.Pattern[str] | Exception] = field(default_factory=dict)
    size_left: int = MAX_COMPILED

    def match(self, pattern: str, text: str, shown: str | None = None) -> regex.Match[str] | None:
        """`re.match`. `shown` is the expression of the config inside `pattern`, for errors.

        Raises InputError if the pattern is not an expression, too long, or too slow.
        """
        return self._run(pattern, pattern if shown is None else shown, text, "match")

    def full(self, pattern: str, text: str) -> bool:
        """Whether `re.fullmatch` finds a match. Raises InputError as `match` does."""
        return self._run(pattern, pattern, text, "fullmatch") is not None

    def _run(
        self, pattern: str, shown: str, text: str, method: Literal["match", "fullmatch"]
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
            found = f"its expressions take too long, such as {shown[:80]!r} on {text!r}"
            self.stopped = InputError(self.where, found, "write them without nested repetition")
            raise self.stopped from None
        except _UNUSABLE as error:
            reason = getattr(error, "msg", None) or str(error)
            found = f"{shown[:80]!r} is not a usable regular expression ({reason[:80]})"
            cure = "correct it"
            if reason.startswith(_FLAGS_INSIDE) and shown != pattern:
                cure = "PEFT puts it inside another expression: write (?i:…) in place of (?i)…"
            raise InputError(self.where, found, cure) from None
        finally:
            self.seconds_left -= time.perf_counter() - began

    def _compile(self, pattern: str) -> regex.Pattern[str] | Exception:
        """The compiled expression, or its error. Raises InputError if the total is too large."""
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


def _compiled(pattern: str) -> regex.Pattern[str]:
    """The expression, compiled by `regex`. Raises the errors in `_UNUSABLE`."""
    if any(special.search(pattern) for special in (_VERBOSE, _BRACE, _POSIX)):
        raise re.error("neither the flag x, nor braces as text, nor [:…:] are understood")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about changes in later versions of Python
        re.compile(pattern)
    return regex.compile(pattern, cache_pattern=False)


@dataclass(frozen=True)
class Targets:
    """The fields of a config that select the adapted modules.

    `target` and `exclude` are an expression, a set of names, or None.
    """

    matcher: Matcher
    target: str | frozenset[str] | None
    exclude: str | frozenset[str] | None
    layers: Collection[int] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]

    def match(self, module: str) -> bool:
        """Whether PEFT adapts a module with this name. Raises InputError.

        A string must match the whole name; a list entry is the name or its ending after a dot.
        "all-linear" and null depend on the model, so every name passes that is not excluded.
        """
        if self.explicit:
            return self.names(module)
        return not self._is_excluded(module)

    @property
    def explicit(self) -> bool:
        """Whether the config names the modules, so that PEFT does not choose them by the model."""
        return self.target is not None and self.target != "all-linear"

    def names(self, module: str) -> bool:
        """Whether the config names a module with this name. Raises InputError."""
        if self.target is None or not self.explicit or self._is_excluded(module):
            return False
        if not self._named(self.target, module):
            return False
        # PEFT checks layer numbers only for names that match a list entry by their ending.
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
        """The number of the layer in the name; None without one."""
        # Without a pattern, PEFT needs two names before the number.
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for pattern in self.layers_pattern or (r"[^.]*",):
            layer = self.matcher.match(rf"{start}{pattern}\.(?P<idx>\d+)\.", module, pattern)
            if layer is not None:
                return None if layer["idx"] is None else int(layer["idx"])
        return None
