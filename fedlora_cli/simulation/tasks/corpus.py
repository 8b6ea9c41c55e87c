"""Examples for training, for the choice of learning rates, and for the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlora_cli.errors import InputError
from fedlora_cli.simulation.client_list import in_order
from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.task import Batch, Examples, IntArray, Owners
from fedlora_cli.simulation.tasks.columns import Wanted, classes, client_names, two_columns
from fedlora_cli.simulation.tasks.tables import read_tables, reading, where
from fedlora_cli.text import shortened

#: Share of the examples that is held out if the data has no test split.
HELD_OUT = 0.2


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a table, read when needed. `labels` (n,) are their classes, or zeros for answers.

    `owners` are the clients of the rows, None unless the data fix them.
    """

    table: Any
    columns: tuple[str, str]
    rows: IntArray
    labels: IntArray
    owners: Owners | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, positions: IntArray) -> tuple[list[Any], list[Any]]:
        """The inputs and the labels at these positions of the part."""
        rows = self.table[self.rows[positions].tolist()]
        first, second = self.columns
        return rows[first], rows[second]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three parts without common rows, the number of classes, 0 for answers, and warnings."""

    train: Part
    validation: Part
    test: Part
    classes: int
    remarks: tuple[str, ...] = ()

    def examples(self, batch: Callable[[Part], Batch]) -> dict[str, Examples]:
        """The three parts as examples, by their names in `Task`."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            name: Examples(part.labels, batch(part), part.owners) for name, part in parts.items()
        }


def read_corpus(source: Source, wanted: Wanted, seed: int) -> Corpus:
    """Read the data of a source and split its rows by the seed.

    The test split, or a fifth of the examples if there is none, is halved into validation and test.
    `source.limit` bounds the training rows and the held-out rows. Each part has the classes in
    their proportions; if the data fix the client of each row, the training part also has the
    clients in their proportions. Raises InputError and UsageError.
    """
    trained, tested = read_tables(source)
    tables = [trained] if tested is None else [trained, tested]
    columns = two_columns(source, tables, wanted)
    if wanted.answers:
        labels, count = [np.zeros(len(table), dtype=np.int64) for table in tables], 0
    else:
        labels, count = classes(source, tables, columns[1])
    names = client_names(source, trained)
    rng = np.random.default_rng(seed)
    orders = [_mixed(of_table, rng.permutation(len(of_table)), rng) for of_table in labels]
    if names is not None:
        orders[0] = _mixed(np.unique(names, return_inverse=True)[1].reshape(-1), orders[0], rng)
    cut = round(HELD_OUT * len(trained)) if tested is None else 0
    train = orders[0][cut:]
    if names is not None:
        train = train[[names[row] != "" for row in train]]
    train = train[: source.limit]
    held_out = (orders[0][:cut] if tested is None else orders[1])[: source.limit]
    if len(train) < 1 or len(held_out) < 2:
        found = f"{len(train)} examples to train on and {len(held_out)} held out are too few"
        raise InputError(where(source), found, "give more data, or a higher --limit")
    half = len(held_out) // 2

    def part(number: int, rows: IntArray) -> Part:
        rows = np.sort(rows)
        table = tables[number].select_columns(list(columns))
        if wanted.holds == "images":
            table = _undecoded(source, table, columns[0])
        return Part(table, columns, rows, labels[number][rows])

    parts = part(0, train), part(-1, held_out[:half]), part(-1, held_out[half:])
    if names is None:
        return Corpus(*parts, count)
    rows = parts[0].rows
    owners = Owners(tuple(names[row] for row in rows), rows)
    remarks = _left_out(source, names, owners.names, held_out=tested is None)
    return Corpus(replace(parts[0], owners=owners), *parts[1:], count, remarks)


def _left_out(
    source: Source, names: Sequence[str], trained: Sequence[str], *, held_out: bool
) -> tuple[str, ...]:
    """Remarks about rows that no client trains on. Raises InputError for a client without rows."""
    listed = [name for name in names if name]
    without = in_order(set(listed) - set(trained))
    reasons = ["held out for the test"] * held_out + ["beyond --limit"] * (source.limit is not None)
    if without:
        found = f"no training rows for {shortened(without)}: all are {' or '.join(reasons)}"
        cure = "give a --test-split, or more rows" if held_out else "give a higher --limit"
        raise InputError(where(source), found, cure)
    remarks = []
    if len(trained) < len(listed):
        remarks.append(
            f"the clients train on {len(trained)} of their {len(listed)} rows: the others are "
            f"{' or '.join(reasons)}"
        )
    if len(listed) < len(names):
        remarks.append(
            f"{len(names) - len(listed)} of {len(names)} training rows belong to no client in "
            f"{source.clients_from}"
        )
    return tuple(remarks)


def _mixed(labels: IntArray, order: IntArray, rng: np.random.Generator) -> IntArray:
    """An order in which each stretch has the labels in about their proportions. Rows of one label
    are in the given order.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        place[of_class] = (np.arange(len(of_class)) + rng.random()) / len(of_class)
    return np.argsort(place, kind="stable")


def _undecoded(source: Source, table: Any, column: str) -> Any:
    """The table with images as bytes or files, not decoded. Raises InputError."""
    from datasets import Image

    feature = table.features[column]
    stored = isinstance(feature, dict) and "bytes" in feature
    if not (stored or isinstance(feature, Image) or getattr(feature, "dtype", "") == "binary"):
        kind = getattr(feature, "dtype", "nested values")
        raise InputError(
            where(source), f"the column {column} holds {kind}", "name a column of images"
        )
    with reading(source):
        return table.cast_column(column, Image(decode=False))
