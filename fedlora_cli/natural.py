"""The order of names with numbers in them."""

from __future__ import annotations

import re


def natural(name: str) -> tuple[str | int, ...]:
    """A key that sorts layer 2 before layer 10.

    >>> sorted(["h.10.b", "h.2.a"], key=natural)
    ['h.2.a', 'h.10.b']
    """
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))
