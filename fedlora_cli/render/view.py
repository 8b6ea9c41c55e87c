"""What a command shows, free of any medium: tables, bars and lines of text.

A report becomes a `View` once; the terminal and the HTML page both draw that.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill
from typing import Literal

#: Characters of a line that every terminal shows whole.
_LINE = 79

#: How a column is laid out: a name may be shortened at its beginning, a phrase in the names that it
#: holds; a number stands to the right.
Kind = Literal["name", "phrase", "text", "number", "bar"]

#: How a paragraph reads: as a statement, as good news, as a warning, as bad news.
Tone = Literal["plain", "good", "warning", "bad"]


@dataclass(frozen=True)
class Bar:
    """A share of the whole, from 0 to 1, drawn as long as it is. None: nobody knows."""

    share: float | None


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind = "number"


Cell = str | Bar


@dataclass(frozen=True)
class Table:
    """Rows of one cell per column. `shown` bounds the rows that a terminal shows, None does not."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    shown: int | None = 20


@dataclass(frozen=True)
class Paragraph:
    """Lines of text, broken where they should be."""

    text: str
    tone: Tone = "plain"


Block = Table | Paragraph


@dataclass(frozen=True)
class View:
    """`subject` is what it is about, `summary` what it is in a line; the blocks stand apart.

    `source` is where it comes from, for a page that is read elsewhere.
    """

    subject: str
    summary: str
    blocks: tuple[Block, ...]
    source: str = ""


def columns(*names: str, kind: Kind = "number") -> tuple[Column, ...]:
    """Columns of one kind."""
    return tuple(Column(name, kind) for name in names)


def count(number: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "client"), count(8, "client")
    ('1 client', '8 clients')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def number(value: float | None, digits: int = 3) -> str:
    """A number as a cell shows it, - where there is none.

    >>> number(0.72149), number(None)
    ('0.721', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}"


def wrapped(text: str, indent: str = "    ") -> str:
    """Text broken into lines that fit everywhere, all but the first one indented.

    >>> wrapped("word " * 20).splitlines()[1][:8]
    '    word'
    """
    return fill(text, width=_LINE, subsequent_indent=indent)


def rho(value: float | None) -> str:
    """An energy ratio with two digits of what is missing to 1.

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
    """A share as a cell shows it, however small.

    >>> share(0.0834), share(0.00000123)
    ('8.3 %', '0.00012 %')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a cell shows it.

    >>> percent(0.721, 1), percent(None)
    ('72.1 %', '-')
    """
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def file_size(amount: int | None) -> str:
    """Bytes as a person counts them.

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
    """Seconds as a person counts them.

    >>> duration(0.1234), duration(75), duration(754), duration(9000)
    ('0.12 s', '75 s', '13 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
