"""Numbers, ranks, sizes and times as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill

#: Characters per line that fit on every terminal.
_LINE = 79


def ranks_text(ranks: Sequence[int]) -> str:
    """The smallest and the largest of several ranks.

    >>> ranks_text([4, 32, 4]), ranks_text([8, 8])
    ('ranks 4 to 32', 'rank 8')
    """
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def shape_text(shape: Sequence[int]) -> str:
    """The shape of a tensor.

    >>> shape_text((64, 32)), shape_text(())
    ('64 x 32', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless the number is 1.

    >>> count(1, "client"), count(8, "client")
    ('1 client', '8 clients')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def number(value: float | None, form: str = ".3f") -> str:
    """A number in a format, or a dash if it is unknown.

    >>> number(0.72149), number(0.0072149, ".3g"), number(None)
    ('0.721', '0.00721', '-')
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def wrapped(text: str, indent: str = "    ") -> str:
    """Text in lines that fit on every terminal; all lines but the first are indented.

    >>> wrapped("word " * 20).splitlines()[1][:8]
    '    word'
    """
    return fill(text, width=_LINE, subsequent_indent=indent)


def rho(value: float | None) -> str:
    """An energy ratio with at least three digits, more if it is close to 1.

    >>> rho(0.72149), rho(0.999791), rho(1.0)
    ('0.721', '0.99979', '1.000')
    """
    if value is None:
        return "-"
    digits = 3
    while digits < 8 and 0 < 1 - value < 9.5 * 10.0**-digits:
        digits += 1
    return f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share in percent; below 0.1 % with two significant digits.

    >>> share(0.0834), share(0.00000123)
    ('8.3 %', '0.00012 %')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"


def percent(value: float | None, digits: int = 0) -> str:
    """A share in percent with a fixed count of digits, or a dash for None.

    >>> percent(0.721, 1), percent(None)
    ('72.1 %', '-')
    """
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def file_size(amount: int | None) -> str:
    """A number of bytes with a decimal unit.

    >>> file_size(28048), file_size(1_234_567_890), file_size(None)
    ('28 kB', '1.2 GB', '-')
    """
    if amount is None:
        return "-"
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= power:
            return f"{amount / power:.{0 if amount >= 10 * power else 1}f} {unit}"
    return f"{amount} B"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> duration(0.1234), duration(75), duration(754), duration(9000)
    ('0.12 s', '75 s', '13 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
