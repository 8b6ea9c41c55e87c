"""The task of a simulation and its base model, loaded once per process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora_cli.errors import UsageError
from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.task import Task
from fedlora_cli.simulation.tasks import digits, families
from fedlora_cli.text import first_line

#: The seed of the test split, the same for all runs.
_HELD_OUT_BY = 0


@lru_cache(maxsize=1)
def loaded(source: Source, root: Path, device: str) -> tuple[Task, Any]:
    """The task and its base model on the device. Raises InputError and UsageError."""
    if source.family == "digits":
        task = digits.make_task(root / "base", source.limit)
    else:
        task = families.make_task(source, _HELD_OUT_BY)
    model = task.load()
    try:
        return task, model.to(device)
    except (RuntimeError, AssertionError) as error:
        found = f"{device} cannot be used ({first_line(error)})"
        raise UsageError("--device", found, "try cpu") from None
