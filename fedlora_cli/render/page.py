"""A view and its figure as one self-contained HTML page."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedlora_cli.render.view import Bar, Block, Column, Paragraph, Table, View
from fedlora_cli.text import printable

#: The tone without color: a sign, and a word for screen readers.
_TONES = {
    "plain": ("", ""),
    "good": ("✓", "Good: "),
    "warning": ("!", "Warning: "),
    "bad": ("✕", "Bad: "),
}


def page(view: View, svg: bytes) -> str:
    """The page: the headline, the figure, and every row of every table.

    `svg` comes from matplotlib and is not escaped. Every text is escaped, and control characters
    are spelled out. The same input gives the same page.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = printable
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["bar"] = lambda cell: isinstance(cell, Bar)
    source = resources.files("fedlora_cli.render").joinpath("page.html").read_text("utf-8")
    return environment.from_string(source).render(
        view=view, figure=_inline(svg), lead=[b for b in view.blocks if _leads(b)],
        rest=[b for b in view.blocks if not _leads(b)], tone=_tone, label=_label, is_head=_is_head,
        has_number=_has_number, width=_width, percent=_percent,
    )  # fmt: skip


def _leads(block: Block) -> bool:
    """Whether the block is a finding: a page shows findings first, a terminal last."""
    return isinstance(block, Paragraph) and block.tone != "plain"


def _inline(svg: bytes) -> Markup:
    """The svg element without the head of its document."""
    text = svg.decode()
    return Markup(text[text.index("<svg") :].strip())  # noqa: S704 - our own drawing


def _tone(block: Paragraph) -> tuple[str, str]:
    return _TONES[block.tone]


def _label(table: Table) -> str:
    """The label of a table without a title: its columns."""
    return ", ".join(column.name for column in table.columns if column.name)


def _is_head(column: Column, position: int) -> bool:
    """Whether the cell is the head of its row."""
    return position == 0 and column.kind in ("name", "text")


def _has_number(columns: tuple[Column, ...], position: int) -> bool:
    """Whether a column beside the bar has the same number and shares its name."""
    return not columns[position].name or not all(c.name for c in columns[position + 1 :][:1])


def _width(cell: Bar) -> str:
    """The length of a bar in percent; every positive share is visible."""
    share = min(max(cell.share or 0.0, 0.0), 1.0)
    return f"{max(100 * share, 0.6 if share else 0.0):.2f}"


def _percent(cell: Bar) -> str:
    return "-" if cell.share is None else f"{100 * cell.share:.3g} %"
