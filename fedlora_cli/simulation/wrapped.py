"""A base model with an adapter on it, and as it was afterwards."""

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
    """The adapter in this folder on the base model, as PEFT loads it.

    Afterwards the base model is what it was: `unload` alone leaves it the head of the adapter, and
    layers that count what they see (BatchNorm) would carry that from client to client. Raises
    InputError.
    """
    from peft import PeftModel

    try:
        model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
    except (OSError, SafetensorError) as error:
        found = f"cannot be read ({first_line(error)})"
        raise InputError(adapter, found, "put it back, or begin in another folder") from error
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
    """What a model holds that is no parameter, as it is now."""
    return {name: one.clone() for name, one in model.named_buffers()}


def restore(model: Any, values: dict[str, Tensor]) -> None:
    """Its parameters or buffers of these names as they were."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
