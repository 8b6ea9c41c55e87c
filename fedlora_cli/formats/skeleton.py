"""The modules that PEFT would adapt in a base model, from the model's configuration alone."""

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
from fedlora_cli.formats.peft.targets import requested_targets
from fedlora_cli.text import first_line

__all__ = ["Skeleton", "make_skeleton", "parameter_name"]


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without weights, and its trainable parts.

    - `model_class`: the full name of the model's class.
    - `modules`: the modules to adapt.
    - `heads`: the tensors to train in full, on the meta device, each with its module.
    - `target_modules`, `target_parameters`: the targets as PEFT has rewritten them.
    - `passed_over`: requested layers that PEFT does not adapt.
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
    """The skeleton of a local folder or a name on the hub. Only the configuration is read.

    `targets` are PEFT's target_modules: names, an expression, "all-linear", or None for PEFT's
    default; `parameters` are its target_parameters. `auto_class` is transformers' class for the
    task; None takes the class in the configuration. Code of a model is never run. Raises InputError
    and UsageError.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    wanted = LoraConfig(
        # The layers' ranks and alphas become multiples of the config's.
        r=1,
        lora_alpha=1,
        # The meta device has no values to initialize.
        init_lora_weights=False,
        task_type=task_type,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        target_parameters=list(parameters) or None,
        modules_to_save=list(modules_to_save) or None,
    )
    model = _model(base, _configuration(base, revision, num_labels), auto_class)
    requested = requested_targets(model, targets, parameters)
    requested.check_heads(modules_to_save)
    with torch.device("meta"):
        try:
            wrapped = get_peft_model(model, wanted)
        except (ValueError, TypeError, re.error) as error:
            raise requested.refused(wanted, error) from None
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # PEFT has rewritten it: "all-linear" to names, names of experts to parameters, and
    # fan_in_fan_out by the type of the layers.
    config: Any = wrapped.peft_config[NAME]
    modules = adapted_modules(wrapped.get_base_model())
    requested.check_targets(config, modules)
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
        passed_over=requested.passed_over(modules),
    )


def _configuration(base: str, revision: str | None, num_labels: int | None) -> Any:
    """The configuration as transformers reads it. Raises InputError."""
    from transformers import AutoConfig

    changes = {} if num_labels is None else {"num_labels": num_labels}
    try:
        return AutoConfig.from_pretrained(
            base, revision=revision, trust_remote_code=False, **changes
        )
    except Exception as error:  # an untrusted config can raise any error
        found = f"its configuration cannot be read ({first_line(error)})"
        if not Path(base).is_dir():
            found = f"no such folder, and no such model can be downloaded ({first_line(error)})"
        raise InputError(base, found, "name a model folder, or a model of the hub") from error


def _model(base: str, config: Any, auto_class: str | None) -> Any:
    """The model on the meta device, of `auto_class` or its config's class. Raises InputError."""
    import transformers

    name = auto_class or (config.architectures or [None])[0]
    kind: Any = getattr(transformers, str(name), None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if auto_class is None and not is_model:
        found = "its configuration names no model class"
        if name is not None:
            found = f"its model class {name} is no model of transformers"
        raise InputError(base, found, "give --task, such as CAUSAL_LM")
    try:
        with torch.device("meta"):
            if auto_class is not None:
                return kind.from_config(config, trust_remote_code=False)
            return kind(config)
    except Exception as error:  # sizes that contradict each other, a missing library
        found = f"{name} cannot be built from its configuration ({first_line(error)})"
        raise InputError(base, found, "give another --task, or check config.json") from error
