"""The embedded task: handwritten digits, and a tiny vision transformer that knows five of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.files.folder import new_folder, other_than
from fedlora_cli.simulation.scoring import count_right
from fedlora_cli.simulation.task import Examples, IntArray, Task

#: The number of digits on which the server trains the base model.
KNOWN = 5
#: Share of the images that is held out, and the share of these for choosing learning rates.
HELD_OUT, VALIDATION = 0.3, 1 / 3
#: Share of the training images of known digits that the server uses.
SERVER = 0.5

#: The split of the data is the same for all runs; their seeds split only the clients' part.
_SEED = 20260213
_EPOCHS, _RATE, _BATCH = 20, 1e-3, 16


def make_task(folder: Path, limit: int | None = None) -> Task:
    """The task with its base model in `folder`, trained if it is missing. Raises InputError.

    `limit` bounds the examples of clients, of validation and of the test. The data are
    scikit-learn's digits: 1797 images of 8 × 8 pixels from the UCI ML repository.
    """
    images, labels = _images()
    server, clients, validation, test = _parts(labels)
    if not folder.exists():
        _make_base(images[server], labels[server], folder)

    def examples(part: IntArray) -> Examples:
        positions = part
        if limit is not None:
            positions = np.sort(np.random.default_rng(_SEED).permutation(part)[:limit])

        def batch(chosen: IntArray) -> dict[str, Tensor]:
            index = torch.from_numpy(positions[chosen])
            return {"pixel_values": images[index], "labels": labels[index]}

        return Examples(labels.numpy()[positions], batch)

    return Task(
        name="handwritten digits",
        model=str(folder),
        load=lambda: _load(folder),
        train=examples(clients),
        validation=examples(validation),
        test=examples(test),
        right=count_right,
        task=None,
        target_modules=("fc1", "fc2", "q_proj", "v_proj"),
        modules_to_save=("classifier",),
        num_labels=None,
    )


def _images() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1], and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        cure = "pip install 'fedlora[simulate]'"
        raise InputError(
            "simulate", "scikit-learn, which has the digits, is not installed", cure
        ) from None
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(bunch.target)


def _parts(labels: Tensor) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Positions of the images of the server, of the clients, of validation, and of the test.

    Except for the server's, each part has all digits in their proportions.
    """
    rng = np.random.default_rng(_SEED)
    parts: tuple[list[IntArray], ...] = ([], [], [], [])
    for digit in range(10):
        positions = rng.permutation(np.flatnonzero(labels.numpy() == digit))
        held_out = round(HELD_OUT * len(positions))
        checked = round(VALIDATION * held_out)
        trained = len(positions) - held_out
        server = round(SERVER * trained) if digit < KNOWN else 0
        cuts = [server, trained, trained + checked]
        for part, piece in zip(parts, np.split(positions, cuts), strict=True):
            part.append(piece)
    server_part, clients, validation, test = (np.sort(np.concatenate(part)) for part in parts)
    return server_part, clients, validation, test


def base_config() -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        id2label={digit: str(digit) for digit in range(10)},
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.1,  # the usual 0.02 is for far wider layers
    )


def _make_base(images: Tensor, labels: Tensor, folder: Path) -> None:
    """Train the base model from scratch on the server's images."""
    from transformers import ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = ViTForImageClassification(base_config())
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        for _ in range(_EPOCHS):
            order = torch.randperm(len(labels))
            for batch in (order[i : i + _BATCH] for i in range(0, len(order), _BATCH)):
                optimizer.zero_grad()
                model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
                optimizer.step()
    with new_folder(folder, force=False, foreign=other_than(())) as place:
        model.save_pretrained(str(place))


def _load(folder: Path) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder)
