"""Names and limits of PEFT's format that other rooms need."""

from __future__ import annotations

from fedlora_cli.formats.peft.fields import LARGEST_ALPHA, TASK_TYPES
from fedlora_cli.formats.peft.names import CONFIG, LORA_BIAS, WEIGHTS, owner_of, target_of
from fedlora_cli.formats.peft.new_config import config_names

__all__ = [
    "CONFIG",
    "LARGEST_ALPHA",
    "LORA_BIAS",
    "TASK_TYPES",
    "WEIGHTS",
    "config_names",
    "owner_of",
    "target_of",
]
