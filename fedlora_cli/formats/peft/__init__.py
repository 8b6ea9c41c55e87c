"""PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors` in one folder."""

from __future__ import annotations

from fedlora_cli.formats.peft.names import CONFIG, WEIGHTS
from fedlora_cli.formats.peft.reading import is_peft, read
from fedlora_cli.formats.peft.writing import check, check_new, writing

__all__ = ["CONFIG", "WEIGHTS", "check", "check_new", "is_peft", "read", "writing"]
