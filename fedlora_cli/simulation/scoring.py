"""The accuracy of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora_cli.simulation.task import Examples, IntArray, Task
from fedlora_cli.simulation.wrapped import wrapped

#: Examples in a forward pass, without gradients.
_AT_ONCE = 256


def count_right(model: Any, examples: Examples, positions: IntArray) -> int:
    """The number of examples whose class has the largest logit."""
    batch = {name: one.to(model.device) for name, one in examples.batch(positions).items()}
    labels = batch.pop("labels")
    return int((model(**batch).logits.argmax(-1) == labels).sum())


def score(task: Task, base: Any, adapter: Path, *, at_once: int = _AT_ONCE) -> tuple[float, float]:
    """The accuracy of a global adapter on the validation and on the test examples."""
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
