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
    tensors = examples.batch(positions)
    batch = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    labels = batch.pop("labels")
    return int((model(**batch).logits.argmax(-1) == labels).sum())


def score(task: Task, base: Any, adapter: Path) -> tuple[float, float]:
    """The accuracy of a global adapter on the validation and on the test examples."""
    accuracies = []
    with wrapped(base, adapter) as model, torch.no_grad():
        model.eval()
        for part in (task.validation, task.test):
            batches = np.split(np.arange(len(part)), range(_AT_ONCE, len(part), _AT_ONCE))
            right = sum(task.right(model, part, positions) for positions in batches)
            accuracies.append(right / len(part))
    validation, test = accuracies
    return validation, test
