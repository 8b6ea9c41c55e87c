"""Names, numbers and errors as text on one line."""

from __future__ import annotations

import re
from collections.abc import Sequence


def natural(name: str) -> tuple[str | int, ...]:
    """A sort key that puts layer 2 before layer 10.

    >>> sorted(["h.10.b", "h.2.a"], key=natural)
    ['h.2.a', 'h.10.b']
    """
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


def shortened(names: Sequence[str], shown: int = 3, total: int | None = None) -> str:
    """The first `shown` names, separated by commas, and how many of `total` are left out.

    >>> shortened(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    total = len(names) if total is None else total
    rest = f" and {total - shown} more" if total > shown else ""
    return ", ".join(names[:shown]) + rest


def printable(text: object) -> str:
    r"""`text` with every control, bidi or otherwise unprintable character escaped.

    Names from untrusted files could hold commands to the terminal.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message, or its class if the message is empty.

    >>> first_line(ValueError("no such mode\nthe modes are ..."))
    'no such mode'
    >>> first_line(AssertionError())
    'AssertionError'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def rank_range(first: int, last: int) -> str:
    """A range of rank indices, counted from 1, as text.

    >>> rank_range(3, 8), rank_range(5, 5)
    ('3-8', '5')
    """
    return str(first) if first == last else f"{first}-{last}"
