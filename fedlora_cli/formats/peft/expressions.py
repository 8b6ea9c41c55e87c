"""An estimate of the compiled size of an expression, made before it is compiled.

Two libraries compile every expression: Python's `re`, to check the syntax, and `regex`, which
matches with a time limit. Compilation has no time limit, and a few bytes can make it run for
minutes: `regex` copies repeated parts, and `re` lists every character of a set.
"""

from __future__ import annotations

import re

#: The deepest nesting of groups. Both libraries recurse into groups; people write three or four.
MAX_DEPTH = 50

#: The cost of a set of characters, in plain characters (measured: 0.25 ms at most against 6 µs).
_SET = 32

#: The cost of a set with characters beyond Latin-1: `re` makes a table of 65 536 (10 ms).
_WIDE_SET = 2_000

#: The fixed cost of every expression (0.3 ms, 3.6 kB).
_EXPRESSION = 50

_TOKEN = re.compile(
    r"(?P<comment>\(\?#[^)]*\))"
    r"|(?P<open>\(\??)|(?P<close>\))"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<count>[*+?]|\{(?P<least>[0-9]*)(?:,[0-9]*)?\})[+?]?"
    r"|\\.|.",
    re.DOTALL,
)

_WIDE = re.compile(r"[^\x00-\xff]|\\[uUN]")


def compiled_size(pattern: str) -> int:
    """The number of plain characters that cost as much as this expression to compile.

    The library writes a part with at least n repetitions n + 1 times. The size of an invalid
    expression is arbitrary. Raises re.error for groups that are nested too deeply.

    >>> compiled_size("abc"), compiled_size("abc+"), compiled_size("(abc){2}")
    (53, 54, 65)
    """
    totals = [_EXPRESSION]
    last = 0  # the size of the part that a following repetition repeats
    for token in _TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind == "comment":
            continue
        if kind == "open":
            totals.append(1)
            if len(totals) > MAX_DEPTH:
                raise re.error(f"groups are nested more than {MAX_DEPTH} deep")
            continue
        if kind == "close" and len(totals) > 1:
            last = totals.pop() + 1
        elif kind == "count":
            last *= 1 if token[0][0] == "+" else int(token["least"] or 0)
        elif kind == "set":
            last = len(token[0]) + (_WIDE_SET if _WIDE.search(token[0]) else _SET)
        else:
            last = 1
        totals[-1] += last
    return sum(totals)
