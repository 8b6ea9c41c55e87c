"""The training of a client in a round: load an adapter, train it, save it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fedlora_cli.errors import OutputError
from fedlora_cli.formats.terms import WEIGHTS
from fedlora_cli.simulation.options import Training
from fedlora_cli.simulation.task import Examples, IntArray
from fedlora_cli.simulation.wrapped import buffers_of, restore, wrapped
from fedlora_cli.text import first_line


class Diverged(Exception):
    """The training of a client diverged to NaN or infinity."""


@dataclass(frozen=True, eq=False)
class Start:
    """A base model with a trainable adapter, its parameters, and their initial values."""

    model: Any
    trained: tuple[torch.nn.Parameter, ...]
    values: dict[str, torch.Tensor]


@contextmanager
def starting_from(base: Any, adapter: Path) -> Iterator[Start]:
    """Load an adapter onto the base model, which is restored after the block. Clients of the same
    rank share it, because PEFT takes longer to wrap a small model than the training takes.
    """
    with wrapped(base, adapter, trainable=True) as model:
        named = model.train().named_parameters()
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        begun = {name: parameter.detach().clone() for name, parameter in trained.items()}
        yield Start(model, tuple(trained.values()), begun | buffers_of(model))


def train_client(
    start: Start,
    examples: Examples,
    mine: IntArray,
    training: Training,
    rate: float,
    seed: int,
    output: Path,
) -> float:
    """Train on the examples at `mine` and save the adapter with its sample count to `output`.

    Uses AdamW (arXiv:1711.05101) without weight decay at a constant rate, with batches in random
    order. Returns the mean loss of the last epoch. Raises Diverged.
    """
    model = start.model
    torch.manual_seed(seed)
    restore(model, start.values)
    optimizer = torch.optim.AdamW(start.trained, lr=rate, weight_decay=0.0)
    total = 0.0
    for _ in range(training.epochs):
        total = 0.0
        order = mine[torch.randperm(len(mine)).numpy()]
        for chosen in np.split(order, range(training.batch_size, len(order), training.batch_size)):
            batch = examples.batch(chosen)
            optimizer.zero_grad()
            loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
    if not (
        math.isfinite(total) and all(bool(values.isfinite().all()) for values in start.trained)
    ):
        raise Diverged(f"{output.name} diverged to NaN or infinity")
    with making(output):
        _save(model, output)
        (output / "fedlora.json").write_text(json.dumps({"samples": len(mine)}), encoding="utf-8")
    return total / len(mine)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Raise errors of writing `folder` as an OutputError. The next call repeats the round."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or first_line(error)).lower()
        cure = "free some space; the same command then resumes"
        raise OutputError(folder, f"cannot be written ({reason})", cure) from error


def _save(model: Any, output: Path) -> None:
    """Save as save_pretrained does, without the model card, which took a quarter of the time."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    output.mkdir(parents=True)
    # Clients send no base weights: PEFT must not save resized embeddings.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, output / WEIGHTS, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(output))
