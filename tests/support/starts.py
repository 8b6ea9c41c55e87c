"""What the tests of round 0 have in common."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

import support.cli
from fedlora_cli import InitOptions
from fedlora_cli.libraries import muted
from support.adapters import PREFIX, WEIGHTS

QV = InitOptions(ranks=(3,), target_modules=("q_proj", "v_proj"))


def set_config(folder: Path, **fields: Any) -> None:
    """Change the configuration of a base model."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / WEIGHTS).items() if "lora_" in k}


def heads(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    return {k.removeprefix(PREFIX): v for k, v in tensors.items() if "lora_" not in k}


Base = Callable[[Callable[[], PreTrainedModel]], Path]


def save_base(folder: Path, build: Callable[[], PreTrainedModel]) -> Path:
    """A tiny base model in this folder, the same one whenever it is asked for."""
    torch.manual_seed(11)
    with muted():
        build().save_pretrained(folder)
    return folder


run = partial(support.cli.run, "init")


def loaded(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter as a client loads it to train on; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True)
