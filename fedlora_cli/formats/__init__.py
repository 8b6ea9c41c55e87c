"""The table of on-disk formats. A format recognises its own folders and reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora_cli.adapter import Adapter
from fedlora_cli.errors import InputError, Report, refuse
from fedlora_cli.formats import peft


@dataclass(frozen=True)
class Format:
    """`recognises` looks at names only; `read` reads headers, as the function below does."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Report], Adapter]


FORMATS: tuple[Format, ...] = (
    Format(f"PEFT LoRA ({peft.CONFIG}, {peft.WEIGHTS})", peft.recognises, peft.read),
)


def is_adapter(folder: Path) -> bool:
    """Whether any format takes this folder for one of its adapters, whole or damaged."""
    return any(known.recognises(folder) for known in FORMATS)


def read(folder: Path, report: Report = refuse) -> Adapter:
    """The adapter in `folder`, headers only. Raises InputError.

    Every fault goes to `report`; if that returns, the adapter is what is left without it.
    """
    for known in FORMATS:
        if known.recognises(folder):
            return known.read(folder, report)
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "check the path")
    names = ", ".join(known.name for known in FORMATS)
    raise InputError(folder, "no adapter in this folder", f"it must hold: {names}")
