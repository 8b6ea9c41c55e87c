"""A base model with an adapter on it, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def wrapped(base: Any, adapter: Path, *, trainable: bool = False) -> Iterator[Any]:
    """The adapter in this folder on the base model, as PEFT loads it.

    Afterwards the base model is what it was: `unload` alone leaves it the head of the adapter.
    """
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
    heads = {
        name: module.original_module
        for name, module in base.named_modules()
        if hasattr(module, "original_module")
    }
    try:
        yield model
    finally:
        model.unload()
        for name, head in heads.items():
            base.set_submodule(name, head)
