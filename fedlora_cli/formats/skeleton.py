"""What PEFT would adapt in a base model, told by the model's configuration alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.layers import (
    NAME,
    Adapted,
    adapted_modules,
    check_tensors,
    parameter_name,
)
from fedlora_cli.formats.peft.targets import request
from fedlora_cli.text import first_line

__all__ = ["Skeleton", "make_skeleton", "parameter_name"]


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without weights, and what of it would be trained.

    `modules` are those to adapt; `heads` are the tensors that are trained in full, on the meta
    device, with the module that owns each. `model_class` is the full name of the model's class.
    `target_modules` and `target_parameters` are PEFT's own, after it has rewritten what was asked;
    `passed_over` are layers that were named and that PEFT does not adapt.
    """

    model: Any
    model_class: str
    modules: Mapping[str, Adapted]
    heads: Mapping[str, tuple[Tensor, str]]
    fan_in_fan_out: bool
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    passed_over: tuple[str, ...]


def make_skeleton(
    base: str,
    revision: str | None,
    auto_class: str | None,
    task_type: str | None,
    targets: Sequence[str] | str | None,
    modules_to_save: Sequence[str],
    num_labels: int | None,
    parameters: Sequence[str] = (),
) -> Skeleton:
    """The skeleton of a local folder or a name on the hub. Only its configuration is read.

    `targets` are PEFT's target_modules: names, an expression or "all-linear", None for those that
    PEFT knows for this architecture; `parameters` are its target_parameters. Without a task of
    `CLASSES`, the class is the one that the base model was saved from. Code that comes with a model
    is never run. Raises InputError and UsageError.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    wanted = LoraConfig(
        # Ranks and alphas of the layers are then multiples of those of the config.
        r=1,
        lora_alpha=1,
        # Nothing is initialized on a device without memory.
        init_lora_weights=False,
        task_type=task_type,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        target_parameters=list(parameters) or None,
        modules_to_save=list(modules_to_save) or None,
    )
    model = _model(base, _configuration(base, revision, num_labels), auto_class)
    asked = request(model, targets, parameters)
    asked.check_heads(modules_to_save)
    with torch.device("meta"):
        try:
            wrapped = get_peft_model(model, wanted)
        except (ValueError, TypeError, re.error) as error:
            raise asked.refused(wanted, error) from None
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # PEFT has changed it: "all-linear" has become names, names of experts parameters, and
    # fan_in_fan_out has been corrected by the type of the layers.
    config: Any = wrapped.peft_config[NAME]
    modules = adapted_modules(wrapped.get_base_model())
    asked.check_targets(config, modules)
    heads = check_tensors(modules, state, tuple(wrapped.modules_to_save or ()))
    selection = config.target_modules
    return Skeleton(
        model=wrapped.unload(),
        model_class=f"{type(model).__module__}.{type(model).__name__}",
        modules=modules,
        heads=heads,
        fan_in_fan_out=bool(config.fan_in_fan_out),
        target_modules=selection if isinstance(selection, str) else tuple(sorted(selection or ())),
        target_parameters=tuple(sorted(config.target_parameters or ())),
        passed_over=asked.passed_over(modules),
    )


def _configuration(base: str, revision: str | None, num_labels: int | None) -> Any:
    """What transformers makes of config.json. Raises InputError."""
    from transformers import AutoConfig

    changes = {} if num_labels is None else {"num_labels": num_labels}
    try:
        return AutoConfig.from_pretrained(
            base, revision=revision, trust_remote_code=False, **changes
        )
    except Exception as error:  # what a stranger wrote there can break anything
        found = f"its configuration cannot be read ({first_line(error)})"
        if not Path(base).is_dir():
            found = f"no such folder, and no model that can be had ({first_line(error)})"
        raise InputError(base, found, "name a model folder, or a model of the hub") from error


def _model(base: str, config: Any, auto_class: str | None) -> Any:
    """The model on the meta device, of the class for the task, or that it was saved from.

    Raises InputError.
    """
    import transformers

    name = auto_class or (config.architectures or [None])[0]
    kind: Any = getattr(transformers, str(name), None)
    if auto_class is None and not _is_model(kind):
        found = "it does not say from which class it was saved"
        if name is not None:
            found = f"it was saved from {name}, which is no model of transformers"
        raise InputError(base, found, "give --task, such as CAUSAL_LM")
    try:
        with torch.device("meta"):
            if auto_class is not None:
                return kind.from_config(config, trust_remote_code=False)
            return kind(config)
    except Exception as error:  # sizes that contradict each other, a library that is not there
        found = f"{name} cannot be made of its configuration ({first_line(error)})"
        raise InputError(base, found, "give another --task, or check config.json") from error


def _is_model(kind: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)
