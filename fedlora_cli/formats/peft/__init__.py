"""PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors` in one folder."""

from __future__ import annotations

from fedlora_cli.formats.peft.names import CONFIG, FILES, WEIGHTS
from fedlora_cli.formats.peft.reading import read, recognises
from fedlora_cli.formats.peft.writing import check, check_new, writing

__all__ = ["CONFIG", "FILES", "WEIGHTS", "check", "check_new", "read", "recognises", "writing"]
