"""How large an expression is once it is compiled, told before it is compiled.

Two libraries compile every expression: Python's own `re`, to learn what Python understands, and
`regex`, which matches with a time limit. Neither can be interrupted, and both can be made to run
for minutes by a few bytes: `regex` copies whatever stands under a repetition, and `re` lists every
character of a set.
"""

from __future__ import annotations

import re

#: Groups inside of groups. Both libraries call themselves for each; people write three or four.
MAX_DEPTH = 50

#: What a set of characters costs, in plain characters (measured: 0.25 ms at most against 6 µs).
_SET = 32

#: A set with characters beyond Latin-1: `re` writes 65 536 of them in a table (10 ms).
_WIDE_SET = 2_000

#: What every expression costs beside its characters (0.3 ms, 3.6 kB).
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
    """How many plain characters cost as much as this expression, with its repetitions written out.

    The library writes what must occur n times n + 1 times. An expression that Python does not
    understand may have any size. Raises re.error for groups that are nested too deeply.

    >>> compiled_size("abc"), compiled_size("abc+"), compiled_size("(abc){2}")
    (53, 54, 65)
    """
    totals = [_EXPRESSION]
    last = 0  # the size of what a repetition that follows would repeat
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
