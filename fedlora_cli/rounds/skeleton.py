"""What PEFT would adapt in a base model, told by the model's configuration alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora_cli.adapter import Kind
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.formats.peft.names import PREFIX, factor_of, owner_of

#: The class of transformers for every task type of PEFT.
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without weights, and what of it would be trained.

    `shapes` are (out, in) and `kinds` the kinds of the modules to adapt; `heads` are the tensors
    that are trained in full, on the meta device, with the module that owns each.
    """

    model: Any
    model_class: str
    shapes: Mapping[str, tuple[int, int]]
    kinds: Mapping[str, Kind]
    heads: Mapping[str, tuple[Tensor, str]]
    fan_in_fan_out: bool


def make_skeleton(
    base: str,
    revision: str | None,
    task_type: str | None,
    targets: Sequence[str] | str | None,
    modules_to_save: Sequence[str],
    num_labels: int | None,
) -> Skeleton:
    """The skeleton of a local folder or a name on the hub. Only its configuration is read.

    `targets` are PEFT's target_modules: names, an expression or "all-linear", None for those that
    PEFT knows for this architecture. Without a task type, the class is the one that the base model
    was saved from. Raises InputError and UsageError.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model, class_name = _model(base, revision, task_type, num_labels)
    config = LoraConfig(
        r=1,
        # Nothing is initialised on a device without memory.
        init_lora_weights=False,
        task_type=task_type,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        modules_to_save=list(modules_to_save) or None,
    )
    with warnings.catch_warnings(), torch.device("meta"):
        # PEFT says that it corrects fan_in_fan_out by the layers, and transformers what it renamed.
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise _not_adapted(targets, error) from None
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    saved = tuple(wrapped.modules_to_save or ())
    shapes: dict[str, tuple[int, int]] = {}
    kinds: dict[str, Kind] = {}
    heads: dict[str, tuple[Tensor, str]] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX)
        factor = factor_of(key)
        if factor is not None:
            module, kinds[module], side = factor
            sides.setdefault(module, {})[side] = tensor
            continue
        owner = owner_of(name, saved)
        if owner is None:
            raise UsageError("--target-modules", f"{name} would be no plain LoRA", "name others")
        heads[name] = (tensor, owner)
    for module, pair in sides.items():
        if pair["A"].dim() != 2:
            found = f"{module} is a convolution"
            raise UsageError("--target-modules", found, "not understood yet; name linear layers")
        shapes[module] = (pair["B"].shape[0], pair["A"].shape[1])
    # PEFT has corrected it by the type of the layers.
    transposed = bool(getattr(wrapped.peft_config["default"], "fan_in_fan_out", False))
    return Skeleton(wrapped.unload(), class_name, shapes, kinds, heads, transposed)


def _model(
    base: str, revision: str | None, task_type: str | None, num_labels: int | None
) -> tuple[Any, str]:
    """The model on the meta device, and the name of its class."""
    import transformers

    changes = {} if num_labels is None else {"num_labels": num_labels}
    try:
        config = transformers.AutoConfig.from_pretrained(base, revision=revision, **changes)
    except (OSError, ValueError) as error:
        found = f"its configuration cannot be read ({_first_line(error)})"
        raise InputError(base, found, "name a model folder, or a model of the hub") from None
    saved_from = (config.architectures or [None])[0]
    name = CLASSES[task_type] if task_type is not None else saved_from
    if name is None or not hasattr(transformers, name):
        found = f"it was saved from {name or 'no class that it names'}"
        raise InputError(base, found, "give --task, such as CAUSAL_LM")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        try:
            model = kind.from_config(config) if name.startswith("Auto") else kind(config)
        except ValueError as error:
            found = f"no {name} ({_first_line(error)})"
            raise InputError(base, found, "give another --task, or none") from None
    return model, type(model).__name__


def _not_adapted(targets: Sequence[str] | str | None, error: ValueError) -> UsageError:
    if targets is None:
        found = "PEFT has no default for this model"
        return UsageError("--target-modules", found, "name them, or give all-linear")
    return UsageError("--target-modules", _first_line(error), "name modules of the model")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
