"""A base model with an adapter, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.text import first_line


@contextmanager
def wrapped(base: Any, adapter: Path, *, trainable: bool = False) -> Iterator[Any]:
    """Load an adapter onto the base model with PEFT, and restore the model after the block.

    PEFT's `unload` alone keeps the head of the adapter, and the statistics of layers such as
    BatchNorm. Raises InputError.
    """
    from peft import PeftModel

    try:
        model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
    except (OSError, SafetensorError) as error:
        found = f"cannot be read ({first_line(error)})"
        raise InputError(adapter, found, "restore it, or start in another folder") from error
    heads = {
        name: module.original_module
        for name, module in base.named_modules()
        if hasattr(module, "original_module")
    }
    counted = buffers_of(base)
    try:
        yield model
    finally:
        restore(base, counted)
        model.unload()
        for name, head in heads.items():
            base.set_submodule(name, head)


def buffers_of(model: Any) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def restore(model: Any, values: dict[str, Tensor]) -> None:
    """Set the parameters or buffers of these names to the given values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
