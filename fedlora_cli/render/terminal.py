"""A view drawn on a terminal of at least 80 columns. Names are text, never markup."""

from __future__ import annotations

from collections.abc import Callable

from rich import table as rich
from rich.cells import cell_len
from rich.console import Group, JustifyMethod, RenderableType
from rich.text import Text

from fedlora_cli.render.view import Bar, Cell, Column, Kind, Paragraph, Table, View
from fedlora_cli.text import printable

#: The width of every table, and the blanks between two of its columns.
_TABLE_WIDTH = 80
_GAP = 2

#: The largest and the smallest width of a bar, and of a name.
_BARS = (28, 10)
_NAMES = (36, 10)

#: The shortest width of a long word; a phrase that is still too long loses its last words.
_LEAST_WORD = 12

_STYLES = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red"}

#: Replacements on terminals that have only ASCII.
_ASCII = str.maketrans({
    "ρ": "rho", "γ": "gamma", "κ": "kappa", "β": "beta", "Δ": "d", "²": "^2", "‖": "|",
    "Σ": "sum", "·": "*", "×": "x", "…": "~", "√": "sqrt ", "±": "+-",
})  # fmt: skip


def on_terminal(view: View, *, plain: bool = False) -> RenderableType:
    """The view as rich draws it; `plain` draws in ASCII."""
    subject, summary = (_written(text, plain=plain) for text in (view.subject, view.summary))
    headline = Text.assemble((subject, "bold"), f": {summary}")
    blocks = [
        _table(block, plain=plain) if isinstance(block, Table) else _paragraph(block, plain=plain)
        for block in view.blocks
    ]
    return Group(headline, *(part for block in blocks for part in (Text(), block)))


def _paragraph(block: Paragraph, *, plain: bool) -> Text:
    lines = "\n".join(_written(line, plain=plain) for line in block.text.split("\n"))
    return Text(lines, style=_STYLES[block.tone])


def _table(block: Table, *, plain: bool) -> RenderableType:
    widths = _widths(block, plain=plain)
    table = rich.Table(box=None, pad_edge=False, header_style="dim")
    for column, width in zip(block.columns, widths, strict=True):
        name = _written(column.name, plain=plain)
        justify: JustifyMethod = "right" if column.kind == "number" else "left"
        bar = width if column.kind == "bar" else None
        table.add_column(name, no_wrap=True, width=bar, justify=justify)
    for row in block.rows[: block.shown]:
        cells = zip(row, block.columns, widths, strict=True)
        table.add_row(*(_cell(*cell, plain=plain) for cell in cells))
    parts: list[RenderableType] = [table]
    if block.title:
        parts.insert(0, Text(_written(block.title, plain=plain), style="bold"))
    hidden = 0 if block.shown is None else len(block.rows) - block.shown
    if hidden > 0:
        parts.append(Text(f"and {hidden} more; -v shows all", style="dim"))
    return Group(*parts)


def _widths(block: Table, *, plain: bool) -> list[int]:
    """The width of each column: names and bars share the rest of the line, names first."""
    room = _TABLE_WIDTH - _GAP * (len(block.columns) - 1)
    widths, bars, names, least = [], [], {}, _BARS[1]
    for i, column in enumerate(block.columns):
        head = cell_len(_written(column.name, plain=plain))
        cells = (_written(str(row[i]), plain=plain) for row in block.rows)
        widths.append(max(head, *map(cell_len, cells), 0))
        if column.kind == "bar":
            bars.append(i)
            least = max(least, head)
        elif column.kind in _SHORTEN:
            names[i] = widths[i]
        else:
            room -= widths[i]
    wanted = sum(min(width, _NAMES[0]) for width in names.values())
    bar = min(_BARS[0], max(least, (room - wanted) // max(len(bars), 1)))
    shared = _shared_out(names, room - len(bars) * bar) | dict.fromkeys(bars, bar)
    return [shared.get(i, width) for i, width in enumerate(widths)]


def _shared_out(wanted: dict[int, int], room: int) -> dict[int, int]:
    """The width of each column: narrow columns get all they need, wide ones share the rest.

    >>> _shared_out({0: 5, 2: 60}, 40)
    {0: 5, 2: 35}
    """
    given = {}
    for left, i in enumerate(sorted(wanted, key=lambda i: wanted[i])):
        given[i] = min(wanted[i], max(_NAMES[1], room // (len(wanted) - left)))
        room -= given[i]
    return given


def _cell(cell: Cell, column: Column, width: int, *, plain: bool) -> Text:
    if isinstance(cell, Bar):
        return Text(_bar(cell.share, width, plain=plain), style="cyan")
    text = printable(cell)
    if column.kind in _SHORTEN:
        text = _SHORTEN[column.kind](text, width)
    return Text(_written(text, plain=plain))


def _written(text: str, *, plain: bool) -> str:
    """Text without control characters, in ASCII if `plain`."""
    return printable(text).translate(_ASCII if plain else {})


def _shortened(name: str, width: int) -> str:
    """A name without its beginning if it is too long, because modules differ at the end.

    >>> _shortened("model.layers.17.self_attn.q_proj", 20)
    '…17.self_attn.q_proj'
    """
    if cell_len(name) <= width:
        return name
    while cell_len(name) >= width:
        name = name[1:]
    return f"…{name}"


def _shortened_phrase(text: str, width: int) -> str:
    """A phrase with its long words shortened at their beginning and, if it is still too long,
    without its last words.

    >>> _shortened_phrase("4, without model.layers.0.mlp.up_proj", 23)
    '4, without …mlp.up_proj'
    >>> _shortened_phrase("4, without layers.0.up_proj, layers.0.down_proj and 12 more", 26)
    '4, without …s.0.up_proj, …'
    """
    words = text.split(" ")
    lengths = [cell_len(word) for word in words[:width]]

    def fits(number: int, longest: int) -> bool:
        ending = 0 if number == len(words) else cell_len(" …")
        return sum(min(n, longest) + 1 for n in lengths[:number]) - 1 + ending <= width

    numbers = range(1, len(lengths) + 1)
    number = max((n for n in numbers if fits(n, _LEAST_WORD)), default=1)
    longest = max((n for n in range(1, width + 1) if fits(number, n)), default=1)
    shown = " ".join(_shortened(word, longest) for word in words[:number])
    return shown if number == len(words) else f"{shown} …"


#: How the text of a column is shortened to fit, by the kind of the column.
_SHORTEN: dict[Kind, Callable[[str, int], str]] = {"name": _shortened, "phrase": _shortened_phrase}


def _bar(share: float | None, width: int, *, plain: bool) -> str:
    """A bar in eighths of a character; every positive share is visible."""
    if not share:
        return ""
    if plain:
        return "#" * max(1, round(share * width))
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
