"""A view and its figure as one self-contained HTML page."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedlora_cli.render.view import Bar, Table, View
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
    text = svg.decode()
    return environment.from_string(source).render(
        view=view,
        figure=Markup(text[text.index("<svg") :].strip()),  # noqa: S704 - our own drawing
        tones=_TONES,
        width=_width,
    )


def _width(cell: Bar) -> str:
    """The length of a bar in percent; every positive share is visible."""
    share = min(max(cell.share or 0.0, 0.0), 1.0)
    return f"{max(100 * share, 0.6 if share else 0.0):.2f}"
