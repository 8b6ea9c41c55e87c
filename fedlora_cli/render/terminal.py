"""A view on a terminal of at least 80 columns. Names are shown as text, never as markup."""

from __future__ import annotations

from rich import table as rich
from rich.console import Group, RenderableType
from rich.text import Text

from fedlora_cli.errors import printable
from fedlora_cli.render.view import Bar, Block, Cell, Column, Paragraph, Table, View

_BAR_WIDTH = 28
_NAME_WIDTH = 36

#: Names keep that many characters even in a table that is too wide otherwise.
_LEAST_NAME = 10

#: Columns of a terminal that every table fits into, and the blanks between two of its own.
_TABLE_WIDTH = 80
_GAP = 2

_STYLES = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red"}


def on_terminal(view: View, *, plain: bool = False) -> RenderableType:
    """The view as rich draws it. `plain` draws in ASCII, for terminals that have nothing else."""
    headline = Text.assemble((printable(view.subject), "bold"), f": {printable(view.summary)}")
    blocks = [_block(block, plain=plain) for block in view.blocks]
    return Group(headline, *(part for block in blocks for part in (Text(), block)))


def _block(block: Block, *, plain: bool) -> RenderableType:
    if isinstance(block, Table):
        return _table(block, plain=plain)
    return _paragraph(block, plain=plain)


def _paragraph(block: Paragraph, *, plain: bool) -> Text:
    lines = "\n".join(printable(line) for line in block.text.split("\n"))
    return Text(lines.replace("ρ", "rho") if plain else lines, style=_STYLES[block.tone])


def _table(block: Table, *, plain: bool) -> RenderableType:
    table = rich.Table(box=None, pad_edge=False, header_style="dim")
    for column in block.columns:
        _add_column(table, column)
    width = _name_width(block)
    for row in block.rows[: block.shown]:
        cells = zip(row, block.columns, strict=True)
        table.add_row(*(_cell(cell, column, width, plain=plain) for cell, column in cells))
    hidden = 0 if block.shown is None else len(block.rows) - block.shown
    if hidden > 0:
        table.add_row(f"and {hidden} more")
    return Group(Text(printable(block.title), style="bold"), table) if block.title else table


def _add_column(table: rich.Table, column: Column) -> None:
    if column.kind == "name":
        table.add_column(column.name, no_wrap=True)
    elif column.kind == "bar":
        table.add_column(column.name, no_wrap=True, width=_BAR_WIDTH)
    elif column.kind == "text":
        table.add_column(column.name, no_wrap=True)
    else:
        table.add_column(column.name, no_wrap=True, justify="right")


def _name_width(block: Table) -> int:
    """The room that the other columns leave for names, at most what names need."""
    room = _TABLE_WIDTH - _GAP * (len(block.columns) - 1)
    for i, column in enumerate(block.columns):
        if column.kind == "bar":
            room -= max(_BAR_WIDTH, len(column.name))
        elif column.kind != "name":
            room -= max(len(column.name), *(len(str(row[i])) for row in block.rows), 0)
    return max(_LEAST_NAME, min(_NAME_WIDTH, room))


def _cell(cell: Cell, column: Column, width: int, *, plain: bool) -> Text:
    if isinstance(cell, Bar):
        return Text(_bar(cell.share, plain=plain), style="cyan")
    text = printable(cell)
    return Text(_shortened(text, width) if column.kind == "name" else text)


def _shortened(name: str, width: int) -> str:
    """A name without its beginning, where it is too long: the end tells modules apart.

    >>> _shortened("model.layers.17.self_attn.q_proj", 20)
    '…17.self_attn.q_proj'
    """
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _bar(share: float | None, *, plain: bool) -> str:
    """A bar of eighths of a character; any share at all shows as something."""
    if not share:
        return ""
    if plain:
        return "#" * max(1, round(share * _BAR_WIDTH))
    eighths = max(1, round(share * _BAR_WIDTH * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
