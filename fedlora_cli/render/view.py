"""The output of a command as tables, bars and paragraphs, independent of the medium.

A report becomes a `View` once; the terminal and the HTML page both draw that view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Literal, TypeVar

#: Characters per line that fit on every terminal.
_LINE = 79

#: The layout of a column: a name is shortened at its beginning, a phrase within its long words;
#: a number is aligned to the right.
Kind = Literal["name", "phrase", "text", "number", "bar"]

#: The meaning of a paragraph, shown by its color.
Tone = Literal["plain", "good", "warning", "bad"]


@dataclass(frozen=True)
class Bar:
    """A share from 0 to 1, drawn as a bar of that length; None if the share is unknown."""

    share: float | None


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind = "number"


Cell = str | Bar


@dataclass(frozen=True)
class Table:
    """Rows with one cell per column. A terminal shows the first `shown` rows; None: all rows."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    shown: int | None = 20


@dataclass(frozen=True)
class Paragraph:
    """Lines of text with their line breaks."""

    text: str
    tone: Tone = "plain"


Block = Table | Paragraph


@dataclass(frozen=True)
class View:
    """The output of one command. `subject` and `summary` make its headline; empty lines separate
    the blocks. `source` is the path of the data; only the HTML page shows it.
    """

    subject: str
    summary: str
    blocks: tuple[Block, ...]
    source: str = ""


Row = TypeVar("Row")

#: One column of a table: its title, its kind, and the cell that it shows for a row.
Field = tuple[str, Kind, Callable[[Row], "Cell | int"]]


def table(
    rows: Iterable[Row], fields: Sequence[Field[Row]], title: str = "", shown: int | None = 20
) -> Table:
    """A table with one line per row and one column per field.

    >>> table([3, 4], [("n", "number", lambda n: n), ("square", "number", lambda n: n * n)]).rows
    (('3', '9'), ('4', '16'))
    """
    cells = tuple(tuple(_cell(get(row)) for _, _, get in fields) for row in rows)
    return Table(tuple(Column(name, kind) for name, kind, _ in fields), cells, title, shown)


def matrix(
    corner: str, names: Iterable[str], heads: Sequence[str], cells: Iterable[Sequence[str]],
    title: str = "",
) -> Table:  # fmt: skip
    """A table of numbers with a name for every row and a head for every column."""
    columns = (Column(corner, "name"), *map(Column, heads))
    rows = tuple((name, *row) for name, row in zip(names, cells, strict=True))
    return Table(columns, rows, title, shown=None)


def _cell(value: Cell | int) -> Cell:
    return value if isinstance(value, Bar) else str(value)


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


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of digits, or a dash for None.

    >>> number(0.72149), number(None)
    ('0.721', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """A number with three significant digits, or a dash for None.

    >>> short(0.0072149), short(None)
    ('0.00721', '-')
    """
    return "-" if value is None else f"{value:.3g}"


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
