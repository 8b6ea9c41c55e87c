"""Weights files in an adapter's folder that are not part of the adapter, found by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from fedlora_cli.remote import Location, Remote, normal
from fedlora_cli.text import shortened

#: The endings of weights files of all frameworks.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|npz|npy|h5|hdf5|keras|msgpack|onnx|pkl|pickle|pdparams"
    r"|distcp|tflite)$",
    re.IGNORECASE,
)

#: Files that a training leaves beside an adapter: states of optimizers, schedulers, random numbers,
#: loss scales and data loaders, and arguments, of Trainer, accelerate, DeepSpeed and torchtune.
_STATES = re.compile(
    r"^((lr_?)?scheduler|optim(izer)?|rng_states?|random_states?|(grad_?)?scaler|sampler|dataloader"
    r"|dl_state|(train(er|ing)|recipe)_(state|args)|.*_optim_states)([-_.].*)?\.\w+$",
    re.IGNORECASE,
)

#: The most names that are checked; no client's folder has nearly as many.
_MOST = 100_000


def other_weights(folder: Location, weights: str) -> tuple[str, ...]:
    """A remark that names all weights files in a folder except `weights`; empty if none."""
    names = sorted(name for name in _names(folder) if is_weights(name) and name != weights)
    if not names:
        return ()
    label = normal(folder).name
    return (f"{label}: weights beside the adapter are left out: {shortened(names, 8)}",)


def is_weights(name: str) -> bool:
    """Whether a visible file with this name holds weights, not the state of a training.

    >>> is_weights("value_head.safetensors"), is_weights("rng_state_0.pth"), is_weights("a.json")
    (True, False, False)
    """
    return name[:1] != "." and bool(_WEIGHTS.search(name)) and not _STATES.match(name)


def _names(folder: Location) -> Iterable[str]:
    """The files in the folder; empty if it cannot be listed, which the reader reports.

    The listing of a remote folder is already in memory from the search for adapters.
    """
    with suppress(OSError):
        if isinstance(folder, Remote):
            return [name for name, info in folder.listing.items() if info["type"] != "directory"]
        with os.scandir(Path(folder)) as files:
            return [file.name for file in islice(files, _MOST) if not file.is_dir()]
    return []
