"""The task of a simulation and its base model, loaded once per process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora_cli.errors import UsageError
from fedlora_cli.simulation.options import Family, Source
from fedlora_cli.simulation.task import Task
from fedlora_cli.simulation.tasks import digits, images, language, texts
from fedlora_cli.text import first_line

#: For each family with the user's model and data, the function that makes a task from a source and
#: a seed for the test split. It raises InputError and UsageError.
FAMILIES: Mapping[Family, Callable[[Source, int], Task]] = {
    "image-classification": images.make_task,
    "text-classification": texts.make_task,
    "causal-lm": language.make_task,
}

#: The seed of the test split, the same for all runs.
_HELD_OUT_BY = 0


@lru_cache(maxsize=1)
def loaded(source: Source, root: Path, device: str) -> tuple[Task, Any]:
    """The task and its base model on the device. Raises InputError and UsageError."""
    if source.family == "digits":
        task = digits.make_task(root / "base", source.limit)
    else:
        task = FAMILIES[source.family](source, _HELD_OUT_BY)
    model = task.load()
    try:
        return task, model.to(device)
    except (RuntimeError, AssertionError) as error:
        found = f"{device} cannot be used ({first_line(error)})"
        raise UsageError("--device", found, "try cpu") from None
