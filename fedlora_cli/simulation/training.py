"""What clients do in a round: load an adapter, train it on their own examples, save it."""

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
    """The training of a client left the range of numbers."""


@dataclass(frozen=True, eq=False)
class Start:
    """A base model with an adapter that can be trained, its parameters, and what it began with."""

    model: Any
    trained: tuple[torch.nn.Parameter, ...]
    values: dict[str, torch.Tensor]


@contextmanager
def starting_from(base: Any, adapter: Path) -> Iterator[Start]:
    """The adapter in this folder on the base model, which is as it was afterwards.

    PEFT takes longer to wrap a small model than to train it: clients of one rank share this.
    """
    with wrapped(base, adapter, trainable=True) as model:
        own = {name: one for name, one in model.train().named_parameters() if one.requires_grad}
        begun = {name: one.detach().clone() for name, one in own.items()}
        yield Start(model, tuple(own.values()), begun | buffers_of(model))


def train_client(
    start: Start,
    examples: Examples,
    mine: IntArray,
    training: Training,
    rate: float,
    seed: int,
    output: Path,
) -> float:
    """Train from the start on the examples at `mine`, save the adapter to `output` with its sample
    count, and return the mean loss of the last epoch. Raises Diverged.

    AdamW (arXiv:1711.05101) without weight decay, one rate, batches in an order drawn from the
    seed.
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
            loss = model(**{name: one.to(model.device) for name, one in batch.items()}).loss
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
    if not (math.isfinite(total) and all(bool(one.isfinite().all()) for one in start.trained)):
        raise Diverged(f"{output.name} went beyond any number")
    with making(output):
        _save(model, output)
        (output / "fedlora.json").write_text(json.dumps({"samples": len(mine)}), encoding="utf-8")
    return total / len(mine)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """What the libraries cannot write is one error, and the round is made again next time.

    Raises OutputError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or first_line(error)).lower()
        cure = "free some space; the same command goes on from here"
        raise OutputError(folder, f"cannot be written ({reason})", cure) from error


def _save(model: Any, output: Path) -> None:
    """What save_pretrained writes, without the model card, which took a quarter of the time."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    output.mkdir(parents=True)
    # Base weights are nobody's to send: PEFT must not look for resized embeddings.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    save_file(contiguous, output / WEIGHTS, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(output))
