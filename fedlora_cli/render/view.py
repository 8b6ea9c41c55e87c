"""The output of a command as tables, bars and paragraphs, independent of the medium.

A report becomes a `View` once; the terminal and the HTML page both draw that view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedlora_cli.render.wording import wrapped

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
Fields = tuple[Field[Row], ...]


def table(
    rows: Iterable[Row], fields: Sequence[Field[Row]], title: str = "", shown: int | None = 20
) -> Table:
    """A table with one line per row and one column per field.

    >>> table([3, 4], [("n", "number", lambda n: n), ("square", "number", lambda n: n * n)]).rows
    (('3', '9'), ('4', '16'))
    """
    values = ((get(row) for _, _, get in fields) for row in rows)
    cells = ((v if isinstance(v, Bar) else str(v) for v in row) for row in values)
    columns = tuple(Column(name, kind) for name, kind, _ in fields)
    return Table(columns, tuple(map(tuple, cells)), title, shown)


def matrix(
    corner: str, names: Iterable[str], heads: Sequence[str], cells: Iterable[Sequence[str]],
    title: str = "",
) -> Table:  # fmt: skip
    """A table of numbers with a name for every row and a head for every column."""
    columns = (Column(corner, "name"), *map(Column, heads))
    rows = tuple((name, *row) for name, row in zip(names, cells, strict=True))
    return Table(columns, rows, title, shown=None)


def paragraphs(lines: Sequence[str], tone: Tone = "plain") -> list[Paragraph]:
    """One paragraph of the lines, wrapped; none without lines."""
    return [Paragraph("\n".join(map(wrapped, lines)), tone)] if lines else []
