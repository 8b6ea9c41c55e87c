"""What the tests of handing out have in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import support.cli
from fedlora_cli import read
from support.adapters import PREFIX, WEIGHTS, Spec
from support.rounds import SHAPES

#: What the global adapter of these tests has: more modules than some clients, fewer than others.
GLOBAL = Spec("global", rank=9, samples=None, alpha=18, shapes=SHAPES)


def dense(folder: Path) -> dict[str, np.ndarray]:
    """The update of every module, as fedlora reads it, in float64."""
    found = {}
    for name, module in read(folder).modules.items():
        factors = module.read()
        found[name] = factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()
    return found


def factors(folder: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of a module, as they are stored."""
    tensors = load_file(folder / WEIGHTS)
    return (
        tensors[f"{PREFIX}{module}.lora_B.weight"],
        tensors[f"{PREFIX}{module}.lora_A.weight"],
    )


run = partial(support.cli.run, "distribute")
