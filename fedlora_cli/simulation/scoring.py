"""How many examples an adapter gets right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora_cli.simulation.task import Examples, IntArray, Task

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
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
    try:
        with torch.no_grad():
            validation, test = (
                sum(
                    task.right(model, part, positions)
                    for positions in np.split(
                        np.arange(len(part)), range(at_once, len(part), at_once)
                    )
                )
                / len(part)
                for part in (task.validation, task.test)
            )
    finally:
        model.unload()
    return validation, test
