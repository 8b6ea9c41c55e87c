"""Kinds of LoRA whose update is not scale · B A on an unchanged base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location

_PLAIN = "train plain LoRA"
_INITIAL = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"

#: Fields of adapters that cannot be averaged without the base model or the training, with their
#: meaning and the remedy.
NOT_UNDERSTOOD: dict[str, tuple[str, str]] = {
    "use_qalora": ("QALoRA, whose A acts on pooled input", _PLAIN),
    "use_bdlora": ("block-diagonal LoRA", _PLAIN),
    "arrow_config": ("Arrow, which routes between adapters", "aggregate its adapters"),
    "kasa_config": ("KaSA, which cuts small directions off the base model by rank", _PLAIN),
    "monteclora_config": ("MonteCLoRA, which has further tensors", _PLAIN),
    "velora_config": ("VeLoRA, which has further tensors", _PLAIN),
    "megatron_config": ("Megatron layers, split over machines", "gather and save it as plain LoRA"),
}

#: Initializations that do not change the base weights. The others move weight from the base into
#: the adapter (PiSSA, OLoRA, CorDA, LoftQ), or freeze a factor (MiCA).
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

#: Unsloth's order of the columns of lora_B of fused experts: as in PEFT, or expert by expert.
B_LAYOUT = "lora_B_layout"
_B_LAYOUT_OF_PEFT = "rank_major"


def variants_of(path: Location, raw: Mapping[str, Any]) -> Iterator[InputError]:
    """The errors of a config about unsupported kinds of LoRA."""
    for name, (meaning, cure) in NOT_UNDERSTOOD.items():
        if raw.get(name):
            yield InputError(path, f"{name}: {meaning}", cure)
    layout = raw.get(B_LAYOUT) or _B_LAYOUT_OF_PEFT
    if layout != _B_LAYOUT_OF_PEFT and raw.get("target_parameters"):
        found = f"{B_LAYOUT} is {str(layout)[:80]!r}, which PEFT would load as other experts"
        yield InputError(path, found, f"save lora_B of the experts as {_B_LAYOUT_OF_PEFT}")
    init = raw.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        found = f"init_lora_weights is {init!r}"
        if isinstance(init, str) and init == "mica":
            yield InputError(path, f"{found}, which freezes one factor", _PLAIN)
        else:
            yield InputError(path, f"{found}, which changes the base model", _INITIAL)
