"""Weights files that lie beside an adapter and are no part of it, told by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from fedlora_cli.remote import Location, Remote, normal
from fedlora_cli.text import shortened

#: The endings of files that hold weights, in whatever framework.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|npz|npy|h5|hdf5|keras|msgpack|onnx|pkl|pickle|pdparams"
    r"|distcp|tflite)$",
    re.IGNORECASE,
)

#: What is expected beside an adapter in training: states of optimizers, schedulers, random numbers,
#: loss scales and data loaders, and arguments, of Trainer, accelerate, DeepSpeed and torchtune.
_STATES = re.compile(
    r"^((lr_?)?scheduler|optim(izer)?|rng_states?|random_states?|(grad_?)?scaler|sampler|dataloader"
    r"|dl_state|(train(er|ing)|recipe)_(state|args)|.*_optim_states)([-_.].*)?\.\w+$",
    re.IGNORECASE,
)

#: Names that are looked at; no client's folder has nearly as many.
_MOST = 100_000


def left_out(folder: Location, weights: str) -> tuple[str, ...]:
    """A remark that names all weights files in an adapter's folder but its own.

    A store is not asked again: it has listed the folder when the adapter was looked for.
    """
    names = sorted(name for name in _names(folder) if is_weights(name) and name != weights)
    if not names:
        return ()
    called = normal(folder).name
    return (f"{called}: weights beside the adapter are left out: {shortened(names, 8)}",)


def is_weights(name: str) -> bool:
    """Whether a visible file of that name holds weights, and not the state of a training.

    >>> is_weights("value_head.safetensors"), is_weights("rng_state_0.pth"), is_weights("a.json")
    (True, False, False)
    """
    return name[:1] != "." and bool(_WEIGHTS.search(name)) and not _STATES.match(name)


def _names(folder: Location) -> Iterable[str]:
    """The files in the folder, as far as it can be looked at: who reads from it is told."""
    with suppress(OSError):
        if isinstance(folder, Remote):
            return [name for name, told in folder.listing.items() if told["type"] != "directory"]
        with os.scandir(Path(folder)) as entries:
            return [entry.name for entry in islice(entries, _MOST) if not entry.is_dir()]
    return []
