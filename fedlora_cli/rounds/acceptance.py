"""Whether PEFT itself takes a start: what it would adapt, given the config that was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora_cli.errors import InputError
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.formats.terms import WEIGHTS
from fedlora_cli.libraries import muted
from fedlora_cli.rounds.recipients import Recipient
from fedlora_cli.text import first_line, shortened

_CURE = "nothing was written; adapt other modules"


def check_in_peft(model: Any, base: str, recipients: Sequence[Recipient], place: Path) -> None:
    """Whether PEFT gives the model exactly the tensors of the adapters in `place`.

    The model is on the meta device. Adapters that adapt the same modules differ in ranks alone, so
    that one of them is tried for all. Raises InputError.
    """
    distinct = {frozenset(one.modules): one for one in recipients}
    for one in distinct.values():
        _check(model, base, place / one.name)


def _check(model: Any, base: str, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    with muted(), torch.device("meta"):
        try:
            config = LoraConfig.from_pretrained(str(folder))
            wrapped = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            found = f"PEFT would not take this start ({first_line(error)})"
            raise InputError(base, found, _CURE) from error
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        wrapped.unload()
    made = {key: tuple(tensor.shape) for key, tensor in state.items()}
    written = {key: entry.shape for key, entry in read_header(folder / WEIGHTS).items()}
    differing = sorted(
        key for key in made.keys() | written.keys() if made.get(key) != written.get(key)
    )
    if differing:
        found = f"PEFT would load this start in another way: {shortened(differing)}"
        raise InputError(base, found, _CURE)
