"""A task: a base model, examples, and the count of right answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int64]

#: Returns the arguments of a model's forward, with labels, for the examples at these positions.
Batch = Callable[[IntArray], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Owners:
    """The client of each example by name, and the example's row in the data, counted from 0."""

    names: tuple[str, ...]
    rows: IntArray


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples, converted to tensors batch by batch.

    `labels` (n,) are the classes that skewed splits use; all zero if there are none. `owners` are
    None unless the data fix the client of each example.
    """

    labels: IntArray
    batch: Batch
    owners: Owners | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Task:
    """A task as simulated clients see it.

    `model` is the path or name of the base model in adapters; `load` returns the model with the
    head that adapters have. `right(model, examples, positions)` counts the right answers of a
    model. `remarks` are warnings about the data. The other fields are options of `fedlora init`.
    """

    name: str
    model: str
    load: Callable[[], Any]
    train: Examples
    validation: Examples
    test: Examples
    right: Callable[[Any, Examples, IntArray], int]
    task: str | None
    target_modules: tuple[str, ...] | str | None
    modules_to_save: tuple[str, ...]
    num_labels: int | None
    remarks: tuple[str, ...] = ()
