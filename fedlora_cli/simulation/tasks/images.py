"""Image classification with any model of transformers for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.rounds.options import ALL_LINEAR
from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.scoring import count_right
from fedlora_cli.simulation.task import IntArray, Task
from fedlora_cli.simulation.tasks.columns import Wanted
from fedlora_cli.simulation.tasks.corpus import Part, read_corpus
from fedlora_cli.simulation.tasks.pretrained import (
    dtype_of,
    load_model,
    loading,
    model_name,
    read_config,
)
from fedlora_cli.simulation.tasks.tables import title, where
from fedlora_cli.text import first_line

_WANTED = Wanted(
    inputs=("image", "img", "pixel_values"),
    labels=("label", "labels", "fine_label", "category"),
    holds="images",
)

_CLASS = "AutoModelForImageClassification"

#: Pillow's modes by the number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

#: Converts images to pixels (n, channels, height, width).
Processor = Callable[[Sequence[Any]], Tensor]


def make_task(source: Source, seed: int) -> Task:
    """The task of a source; images are decoded batch by batch. Raises InputError and UsageError."""
    if find_spec("PIL") is None:
        cure = "pip install 'fedlora[simulate]'"
        raise InputError("simulate", "images are read by Pillow", cure)
    model, dtype = model_name(source), dtype_of(source)
    corpus = read_corpus(source, _WANTED, seed)
    changes = {"num_labels": corpus.classes, "problem_type": "single_label_classification"}
    config = read_config(model, **changes)
    heads = source.modules_to_save if source.modules_to_save is not None else _heads(model)
    mode = _MODES.get(getattr(config, "num_channels", 3), "RGB")
    processor = _processor(model, config, mode)

    def batch(part: Part, chosen: IntArray) -> dict[str, Tensor]:
        images = [_decoded(where(source), image, mode) for image in part.read(chosen)[0]]
        pixels = processor(images).to(dtype)
        return {"pixel_values": pixels, "labels": torch.from_numpy(part.labels[chosen])}

    return Task(
        name=f"image classification, {title(source)}",
        model=model,
        load=partial(load_model, source, _CLASS, heads, **changes),
        **corpus.examples(lambda part: partial(batch, part)),
        right=count_right,
        task="IMAGE_CLS",
        target_modules=source.target_modules or ALL_LINEAR,
        modules_to_save=heads,
        num_labels=corpus.classes,
        remarks=corpus.remarks,
    )


def _heads(model: str) -> tuple[str, ...]:
    """The modules whose shape follows the number of classes."""
    import transformers

    kind: Any = getattr(transformers, _CLASS)
    shapes: list[dict[str, Any]] = []
    for number in (2, 3):
        config = read_config(model, num_labels=number)
        with loading(model, "configuration"), torch.device("meta"):
            skeleton = kind.from_config(config, trust_remote_code=False)
        shapes.append({name: tensor.shape for name, tensor in skeleton.state_dict().items()})
    few, more = shapes
    return tuple(sorted({name.rpartition(".")[0] for name in few if few[name] != more[name]}))


def _processor(model: str, config: Any, mode: str) -> Processor:
    """The model's image processor, or its size and pixels in [-1, 1]. Raises InputError."""
    import transformers
    from PIL import Image
    from transformers.utils.hub import cached_file

    kind: Any = transformers.AutoImageProcessor
    with loading(model, "image processor"):
        quiet = {"_raise_exceptions_for_missing_entries": False}
        if cached_file(model, "preprocessor_config.json", **quiet) is not None:
            saved = kind.from_pretrained(model, trust_remote_code=False)
            saved([Image.new(mode, (8, 8))], return_tensors="pt")  # whether it takes such images
            return lambda images: saved(images, return_tensors="pt")["pixel_values"]
    size = getattr(config, "image_size", None)
    if size is None:
        found = "neither a preprocessor_config.json nor an image_size in its configuration"
        raise InputError(model, found, "save its image processor beside it")
    height, width = (size, size) if isinstance(size, int) else size
    return partial(_plain, width=width, height=height)


def _plain(images: Sequence[Any], width: int, height: int) -> Tensor:
    resized = [np.asarray(image.resize((width, height)), dtype=np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(resized)) / 127.5 - 1
    return pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def _decoded(data: str, stored: dict[str, Any], mode: str) -> Any:
    """An image of that mode from its bytes, or from its file here. Raises InputError."""
    from PIL import Image, ImageOps

    content, path = stored["bytes"], stored["path"]
    try:
        with Image.open(BytesIO(content) if content is not None else Path(path)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}; 8 bits are understood")
            return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # broken bytes break Pillow in many ways
        found = f"an image cannot be decoded ({first_line(error)})"
        raise InputError(path or data, found, "replace it, or leave it out") from None
