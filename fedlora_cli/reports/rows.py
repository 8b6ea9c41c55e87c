"""Rows of a report as CSV: a header with the names of the fields, then a line for each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, fields
from typing import Any


def to_csv(kind: type, rows: Iterable[Any]) -> str:
    """The rows, instances of the dataclass `kind`, as CSV; None is an empty cell.

    Numbers have all digits, so that reading them gives the same numbers.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
    writer.writerows([_cell(value) for value in astuple(row)] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    """A value as text.

    >>> [_cell(value) for value in (None, True, 0.1, 3, "raflora")]
    ['', 'true', '0.1', '3', 'raflora']
    """
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
