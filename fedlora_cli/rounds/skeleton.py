"""What PEFT would adapt in a base model, told by the model's configuration alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_cli.adapter import Kind
from fedlora_cli.cohort import shortened
from fedlora_cli.errors import InputError, UsageError, first_line
from fedlora_cli.formats.peft.fields import TASK_TYPES
from fedlora_cli.formats.peft.names import PREFIX, factor_of, owner_of
from fedlora_cli.rounds.options import CLASSES


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
    task: str | None,
    targets: Sequence[str] | str | None,
    modules_to_save: Sequence[str],
    num_labels: int | None,
) -> Skeleton:
    """The skeleton of a local folder or a name on the hub. Only its configuration is read.

    `targets` are PEFT's target_modules: names, an expression or "all-linear", None for those that
    PEFT knows for this architecture. Without a task of `CLASSES`, the class is the one that the
    base model was saved from. Code that comes with a model is never run. Raises InputError and
    UsageError.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(
        r=1,
        # Nothing is initialised on a device without memory.
        init_lora_weights=False,
        task_type=task if task in TASK_TYPES else None,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        modules_to_save=list(modules_to_save) or None,
    )
    model = _model(base, _configuration(base, revision, num_labels), task)
    known = _known(model)
    _check_names(model, targets, modules_to_save, known)
    with torch.device("meta"):
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, re.error) as error:
            raise _not_adapted(model, targets, known, error) from None
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    shapes, kinds, heads = _sorted(state, tuple(wrapped.modules_to_save or ()))
    # PEFT has corrected it by the type of the layers.
    transposed = bool(getattr(wrapped.peft_config["default"], "fan_in_fan_out", False))
    return Skeleton(wrapped.unload(), type(model).__name__, shapes, kinds, heads, transposed)


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


def _model(base: str, config: Any, task: str | None) -> Any:
    """The model on the meta device, of the class for the task, or that it was saved from.

    Raises InputError.
    """
    import transformers

    name = CLASSES[task] if task is not None else (config.architectures or [None])[0]
    kind: Any = getattr(transformers, str(name), None)
    if task is None and not _is_model(kind):
        found = "it does not say from which class it was saved"
        if name is not None:
            found = f"it was saved from {name}, which is no model of transformers"
        raise InputError(base, found, "give --task, such as CAUSAL_LM")
    try:
        with torch.device("meta"):
            if task is not None:
                return kind.from_config(config, trust_remote_code=False)
            return kind(config)
    except Exception as error:  # sizes that contradict each other, a library that is not there
        found = f"{name} cannot be made of its configuration ({first_line(error)})"
        raise InputError(base, found, "give another --task, or check config.json") from error


def _is_model(kind: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _check_names(
    model: Any, targets: Sequence[str] | str | None, modules_to_save: Sequence[str], known: str
) -> None:
    """Whether all that is named is there: PEFT passes over what is not. Raises UsageError."""
    names = [name for name, _ in model.named_modules()]
    for wanted in () if isinstance(targets, str) else targets or ():
        if not any(f".{name}".endswith(f".{wanted}") for name in names):
            raise UsageError("--target-modules", f"no module is named {wanted}", known)
    for wanted in modules_to_save:
        if not any(name.endswith(wanted) for name in names):
            found = f"no module is named {wanted}"
            outermost = shortened([name for name, _ in model.named_children()], 5)
            raise UsageError("--modules-to-save", found, f"the outermost are {outermost}")


def _sorted(
    state: Mapping[str, Tensor], saved: tuple[str, ...]
) -> tuple[
    dict[str, tuple[int, int]],
    dict[str, Kind],
    dict[str, tuple[Tensor, str]],
]:
    """Shapes and kinds of what is adapted, and the heads with the module that owns each.

    Raises UsageError for what fedlora does not understand.
    """
    shapes: dict[str, tuple[int, int]] = {}
    kinds: dict[str, Kind] = {}
    heads: dict[str, tuple[Tensor, str]] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX)
        factor = factor_of(key)
        owner = owner_of(name, saved)
        if factor is not None:
            module, kinds[module], side = factor
            sides.setdefault(module, {})[side] = tensor
        elif owner is not None:
            heads[name] = (tensor, owner)
        else:
            raise UsageError("--target-modules", f"{name} would be no plain LoRA", "name others")
    for module, pair in sides.items():
        if pair["A"].dim() != 2:
            found = f"{module} is a convolution"
            raise UsageError("--target-modules", found, "not understood yet; name linear layers")
        shapes[module] = (pair["B"].shape[0], pair["A"].shape[1])
    return shapes, kinds, heads


def _not_adapted(
    model: Any, targets: Sequence[str] | str | None, known: str, error: Exception
) -> UsageError:
    if targets is None:
        found = f"PEFT has no default for {type(model).__name__}"
        return UsageError("--target-modules", found, f"{known}, or give all-linear")
    return UsageError("--target-modules", first_line(error), known)


def _known(model: Any) -> str:
    """The names that one can give."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    last = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }
    return f"name some of {shortened(list(last), 12)}"
