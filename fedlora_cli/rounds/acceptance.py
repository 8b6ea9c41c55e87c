"""A check that PEFT loads an initial adapter: it adapts the modules that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.formats.terms import CONFIG, WEIGHTS
from fedlora_cli.libraries import muted
from fedlora_cli.remote import Location
from fedlora_cli.rounds.recipients import Recipient
from fedlora_cli.text import first_line, shortened

_CURE = "nothing was written; adapt other modules"


def check_in_peft(model: Any, base: str, recipients: Sequence[Recipient], place: Location) -> None:
    """Raise InputError unless PEFT makes exactly the tensors of the adapters in `place`.

    The model is on the meta device. Adapters of the same modules differ only in ranks, so that one
    of them is checked.
    """
    for recipient in {frozenset(one.modules): one for one in recipients}.values():
        _check(model, base, place / recipient.name)


def _check(model: Any, base: str, folder: Location) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    load: Callable[..., LoraConfig] = LoraConfig.from_peft_type

    with muted(), torch.device("meta"):
        try:
            config = load(**read_object(folder / CONFIG))
            wrapped = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            found = f"PEFT rejects this initial adapter ({first_line(error)})"
            raise InputError(base, found, _CURE) from error
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        wrapped.unload()
    made = {(key, tuple(tensor.shape)) for key, tensor in state.items()}
    written = {(key, entry.shape) for key, entry in read_header(folder / WEIGHTS).items()}
    differing = sorted({key for key, _ in made ^ written})
    if differing:
        found = f"PEFT would load this initial adapter differently: {shortened(differing)}"
        raise InputError(base, found, _CURE)
