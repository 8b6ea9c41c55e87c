"""The families of tasks for the user's own model and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlora_cli.simulation.options import Family, Source
from fedlora_cli.simulation.task import Task
from fedlora_cli.simulation.tasks import images, language, texts

#: For each family, the function that makes a task from a source and a seed for the test split.
FAMILIES: Mapping[Family, Callable[[Source, int], Task]] = {
    "image-classification": images.make_task,
    "text-classification": texts.make_task,
    "causal-lm": language.make_task,
}


def make_task(source: Source, seed: int) -> Task:
    """The task of a source. Raises InputError and UsageError."""
    return FAMILIES[source.family](source, seed)
