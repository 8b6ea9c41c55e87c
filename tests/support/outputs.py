"""Output folders: what is whole, and what lies beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedlora_cli.execution import engine


def whole(out: Path) -> bytes:
    """The weights of an adapter whose manifest is true of it."""
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"fedlora.json"}
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    assert json.loads((out / "fedlora.json").read_text())["files"] == found
    return (out / "adapter_model.safetensors").read_bytes()


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {"round", out.name}


def never(stage: str) -> engine.Progress:
    """Every work says that it begins."""
    raise AssertionError(f"{stage} has begun")
