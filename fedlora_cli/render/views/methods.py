"""The table of methods."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora_cli.methods.method import Method
from fedlora_cli.render.view import Table, View, columns, count


def methods_view(methods: Iterable[Method]) -> View:
    """Every method with its weights and its paper, what it does on the line below."""
    listed = list(methods)
    rows = [
        row
        for method in listed
        for row in ((method.name, method.formula, method.source), ("", method.summary, ""))
    ]
    heads = columns("method", "weight of client k at rank index i", "source", kind="text")
    return View(
        "methods",
        f"{count(len(listed), 'way')} to aggregate",
        (Table(heads, tuple(rows), shown=None),),
    )
