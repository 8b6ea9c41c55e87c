"""What a federation trains: a base model, examples, and when an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int64]

#: The arguments of a model's forward, labels included, for the examples at these positions.
Batch = Callable[[IntArray], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples that are made into tensors when they are asked for.

    `labels` (n,) are their classes, all zero where there are none: what skewed splits go by.
    """

    labels: IntArray
    batch: Batch

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Task:
    """A task as simulated clients see it.

    `model` is the folder or the name of the base model, which adapters name; `load` brings it,
    with the head that the adapters have. `right(model, examples, positions)` counts the examples
    that a model gets right. The rest is what `fedlora init` must know.
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
