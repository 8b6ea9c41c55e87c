"""Reports in a notebook: a line as `repr`, a fragment of HTML for Jupyter's `_repr_html_`.

Names come from files of others, so all text is escaped, and shortened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any, Protocol, TypeVar

from fedlora_cli.text import printable, rank_range, shortened

R = TypeVar("R", bound="_Report")
T = TypeVar("T")

#: The most rows of a table, and the most warnings: a screen full.
SHOWN = 20

#: The most characters of a value, and of a sentence.
_VALUE, _SENTENCE = 60, 500

#: Colors of text and background are those of the page, be it light or dark; notebooks typeset
#: formulas in any text but that of these classes.
_FRAGMENT = '<div class="tex2jax_ignore mathjax_ignore">\n{}\n</div>'
_WARNINGS = "border-left: 4px solid #d97706; padding-left: 2em"
_NOTES = "padding-left: 2em"


@dataclass(frozen=True)
class Table:
    """The first rows of a table, of `total`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    total: int


@dataclass(frozen=True)
class Summary:
    """The facts of a report that a reader asks for first; without a value, a fact is left out.

    Pages begin with the `warnings`, counted under the name `alarm`, and end with the `notes`.
    """

    facts: tuple[tuple[str, object], ...]
    warnings: Sequence[str]
    table: Table
    notes: Sequence[str] = ()
    alarm: str = "warnings"


class _Report(Protocol):
    def _summary(self) -> Summary: ...


def shown_by_summary(kind: type[R]) -> type[R]:
    """A decorator that shows the reports of a class by their summaries."""

    def in_line(report: _Report) -> str:
        return _in_line(kind.__name__, report._summary())

    def in_html(report: _Report) -> str:
        return _in_html(kind.__name__, report._summary())

    kind.__repr__ = in_line  # type: ignore[assignment,method-assign]
    kind._repr_html_ = in_html  # type: ignore[attr-defined]
    return kind


def table(
    columns: tuple[str, ...], items: Collection[T], row: Callable[[T], tuple[object, ...]]
) -> Table:
    """A table of the first items."""
    return Table(columns, tuple(map(row, islice(items, SHOWN))), len(items))


def span(ranks: Iterable[int]) -> str | None:
    """The smallest and the largest rank as text; None without a rank.

    >>> span([4, 16, 2])
    '2-16'
    """
    known = sorted(ranks)
    return rank_range(known[0], known[-1]) if known else None


class _Partition(Protocol):
    """Rank indices first..last, and the number of clients that have them."""

    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def holders(self) -> int: ...


def at_risk(partitions: Iterable[_Partition]) -> str | None:
    """The rank indices that one client alone has; None if there are none."""
    alone = [rank_range(row.first, row.last) for row in partitions if row.holders == 1]
    return shortened(alone) if alone else None


def _in_line(name: str, summary: Summary) -> str:
    facts = [f"{label} {_text(value)}" for label, value in _known(summary)]
    return f"<{name}: {', '.join(facts)}>"


def _in_html(name: str, summary: Summary) -> str:
    parts = [f"<strong>{escape(name)}</strong>"]
    if summary.warnings:
        parts.append(_html_list(summary.warnings, _WARNINGS))
    facts = [(f"{label}:", _text(value)) for label, value in _known(summary)]
    parts.append(" · ".join(f"{escape(label)} <b>{escape(text)}</b>" for label, text in facts))
    if summary.table.rows:
        parts.append(_html_table(summary.table))
    if more := summary.table.total - len(summary.table.rows):
        parts.append(f"and {more} more of {summary.table.total} rows; to_dict() has all of them")
    if summary.notes:
        parts.append(_html_list(summary.notes, _NOTES))
    return _FRAGMENT.format("\n".join(f"<div>{part}</div>" for part in parts))


def _html_list(sentences: Sequence[str], style: str) -> str:
    lines = [_cut(printable(text), _SENTENCE) for text in sentences[:SHOWN]]
    if more := len(sentences) - len(lines):
        lines.append(f"and {more} more; to_dict() has all of them")
    return f'<ul style="{style}">\n{"".join(f"<li>{escape(line)}</li>" for line in lines)}\n</ul>'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = ("".join(f"<td>{escape(_text(cell))}</td>" for cell in row) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in (head, *rows))
    return f"<table>\n{body}\n</table>"


def _known(summary: Summary) -> list[tuple[str, object]]:
    """The facts with a value, and the number of warnings."""
    facts = [(label, value) for label, value in summary.facts if value is not None]
    return [*facts, (summary.alarm, len(summary.warnings))]


def _text(value: Any) -> str:
    r"""A value as short text: four digits of a number, and no end of a long name.

    >>> _text(None), _text(12345), _text(0.123456), _text(float("nan")), _text("a\n")
    ('-', '12345', '0.1235', '-', 'a\\n')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
    return _cut(printable(value), _VALUE)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
