"""The view of the table of methods."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora_cli.methods.method import Method
from fedlora_cli.render.view import View, table
from fedlora_cli.render.wording import count


def methods_view(methods: Iterable[Method]) -> View:
    """Two lines per method: its weights and its paper, then its summary and its distribution."""
    listed = list(methods)
    lines = table(
        [
            line
            for method in listed
            for line in (
                (method.name, method.formula, method.source),
                ("", method.summary, method.distribution or ""),
            )
        ],
        [
            ("method", "text", lambda line: line[0]),
            ("weight of client k at rank index i", "text", lambda line: line[1]),
            ("source", "text", lambda line: line[2]),
        ],
        shown=None,
    )
    return View("methods", f"{count(len(listed), 'way')} to aggregate", (lines,))
