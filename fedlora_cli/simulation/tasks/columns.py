"""The columns of inputs and labels in a table, and the classes of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.simulation.client_list import check_names, in_order, read_client_list
from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.task import IntArray
from fedlora_cli.simulation.tasks.tables import where
from fedlora_cli.text import shortened

_STRINGS = ("string", "large_string")


@dataclass(frozen=True)
class Wanted:
    """Usual names of the columns of inputs and labels; the first that exists is taken.

    `holds` is the type of the inputs. With `answers`, labels are texts, not classes.
    """

    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    holds: Literal["images", "texts"]
    answers: bool = False


def two_columns(source: Source, tables: Sequence[Any], wanted: Wanted) -> tuple[str, str]:
    """The columns of inputs and labels. Raises InputError, for empty values too, and UsageError."""
    names = list(tables[0].column_names)
    chosen = _named(source, names, "--input", source.input, wanted.inputs)
    label = _named(source, names, "--label", source.label, wanted.labels)
    if chosen == label:
        raise UsageError("--input, --label", f"both are {label}", "name two columns")
    for table in tables:
        for name in (chosen, label):
            if name not in table.column_names:
                found = f"no column {name} in one of the splits"
                raise InputError(where(source), found, "give splits of the same columns")
            missing = table.data.column(name).null_count
            if missing:
                found = f"the column {name} is empty in {missing} of {len(table)} rows"
                raise InputError(where(source), found, "leave these rows out, or fill them")
    texts = [chosen] if wanted.holds == "texts" else []
    for name in [*texts, label] if wanted.answers else texts:
        kind = getattr(tables[0].features[name], "dtype", "nested values")
        if kind not in _STRINGS:
            raise InputError(
                where(source), f"the column {name} holds {kind}", "name a column of texts"
            )
    return chosen, label


def _named(
    source: Source, names: Sequence[str], flag: str, given: str | None, usual: Sequence[str]
) -> str:
    wanted = usual if given is None else (given,)
    column = next((name for name in wanted if name in names), None)
    if column is None:
        *most, last = wanted
        either = f"{', '.join(most)} or {last}" if most else last
        cure = f"name one with {flag}; there are {', '.join(names)}"
        raise InputError(where(source), f"no column {either}", cure)
    return column


def client_names(source: Source, table: Any) -> tuple[str, ...] | None:
    """The client of each row of the training table by name, "" for a row of no client.

    None if neither a column nor a file names the clients. Raises InputError and UsageError.
    """
    if source.clients_from is not None:
        return read_client_list(source.clients_from).by_row(len(table))
    if source.client_column is None:
        return None
    column = _named(source, list(table.column_names), "--client-column", source.client_column, ())
    feature = table.features[column]
    labels, kind = getattr(feature, "names", None), getattr(feature, "dtype", "nested values")
    if kind not in (*_STRINGS, "bool") and not kind.startswith(("int", "uint")):
        found = f"the column {column} holds {kind}, not names of clients"
        raise InputError(where(source), found, "name a column of texts or whole numbers")
    values = table.select_columns([column])[:][column]
    # -1 is the missing class of a ClassLabel.
    empty = sum(value in (None, "") or (labels is not None and value == -1) for value in values)
    if empty:
        found = f"the column {column} is empty in {empty} of {len(values)} rows"
        raise InputError(where(source), found, "leave these rows out, or fill them")
    names = tuple(str(value) if labels is None else labels[value] for value in values)
    different = in_order(names)
    if len(different) < 2:
        found = f"the column {column} has a single client, {shortened(different)}"
        raise InputError(where(source), found, "name a column with two clients or more")
    check_names(different, f"{where(source)}, column {column}")
    return names


def classes(source: Source, tables: Sequence[Any], label: str) -> tuple[list[IntArray], int]:
    """The class of each row of each table, from 0 on, and the number of classes.

    The numbers of a `ClassLabel` are kept; other values are numbered in sorted order of all tables.
    Raises InputError.
    """
    feature = tables[0].features[label]
    columns = [table.select_columns([label])[:][label] for table in tables]
    names = getattr(feature, "names", None)
    kind = getattr(feature, "dtype", "nested values")
    if names is None and kind not in (*_STRINGS, "bool") and not kind.startswith(("int", "uint")):
        found = f"the column {label} holds {kind}, not classes"
        raise InputError(where(source), found, "name a column of texts or whole numbers")
    values = {value for column in columns for value in column}
    if "" in values or (names is not None and -1 in values):
        found = f"the column {label} has no class in some rows"
        raise InputError(where(source), found, "leave these rows out, or name another --test-split")
    known = {value: k for k, value in enumerate(range(len(names)) if names else sorted(values))}
    rows = sum(len(column) for column in columns)
    if not 2 <= len(known) <= max(2, rows // 2):
        found = f"the column {label} holds {len(known)} different values in {rows} rows"
        raise InputError(where(source), found, "name a column of classes with --label")
    numbered = [np.array([known[value] for value in column], dtype=np.int64) for column in columns]
    return numbered, len(known)
