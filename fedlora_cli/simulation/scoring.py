"""How many examples an adapter gets right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora_cli.simulation.task import Examples, IntArray, Task
from fedlora_cli.simulation.wrapped import wrapped

#: Examples in one forward pass, none of which keeps anything for a backward pass.
_AT_ONCE = 256


def count_right(model: Any, examples: Examples, positions: IntArray) -> int:
    """The examples whose class has the largest logit."""
    batch = {name: one.to(model.device) for name, one in examples.batch(positions).items()}
    labels = batch.pop("labels")
    return int((model(**batch).logits.argmax(-1) == labels).sum())


def score(task: Task, base: Any, adapter: Path, *, at_once: int = _AT_ONCE) -> tuple[float, float]:
    """The shares that a global adapter gets right, of the validation and of the test examples.

    `base` is as it was afterwards.
    """
    with wrapped(base, adapter) as model, torch.no_grad():
        model.eval()
        validation, test = (
            sum(task.right(model, part, positions) for positions in _batches(len(part), at_once))
            / len(part)
            for part in (task.validation, task.test)
        )
    return validation, test


def _batches(number: int, at_once: int) -> list[IntArray]:
    return np.split(np.arange(number), range(at_once, number, at_once))
