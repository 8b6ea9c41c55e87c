"""Names, numbers and errors as words on a line."""

from __future__ import annotations

import re
from collections.abc import Sequence


def natural(name: str) -> tuple[str | int, ...]:
    """A key that sorts layer 2 before layer 10.

    >>> sorted(["h.10.b", "h.2.a"], key=natural)
    ['h.2.a', 'h.10.b']
    """
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


def shortened(names: Sequence[str], shown: int = 3, total: int | None = None) -> str:
    """Names in a line, the first few of them, of so many in all.

    >>> shortened(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    total = len(names) if total is None else total
    rest = f" and {total - shown} more" if total > shown else ""
    return ", ".join(names[:shown]) + rest


def printable(text: object) -> str:
    r"""`text` on one line, with every control, bidi or otherwise unprintable character escaped.

    Names come from untrusted files; a terminal must never obey them.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    r"""What a library's error says, of which many take a page; its kind where it says nothing.

    >>> first_line(ValueError("no such mode\nthe modes are ..."))
    'no such mode'
    >>> first_line(AssertionError())
    'AssertionError'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def rank_range(first: int, last: int) -> str:
    """Rank indices as people read them, counted from 1.

    >>> rank_range(3, 8), rank_range(5, 5)
    ('3-8', '5')
    """
    return str(first) if first == last else f"{first}-{last}"
