"""The table of on-disk formats. A format is one file, or one package, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_cli.adapter import Adapter, NewAdapter, Put
from fedlora_cli.errors import InputError, Report, refuse
from fedlora_cli.formats import kohya, peft
from fedlora_cli.natural import natural
from fedlora_cli.remote import Location


@dataclass(frozen=True)
class Format:
    """One format. `recognises` looks at names only, `read` reads headers, as the function below
    does; `writing` takes the pieces of an adapter into an existing folder. `files` are all that a
    folder of this format can hold when fedlora wrote it, `weights` is the one with the tensors.
    `library` is what model hubs call the library that loads it, where one does. `check` raises
    InputError where that library would not load all that a folder holds.
    """

    name: str
    summary: str
    recognises: Callable[[Location], bool]
    read: Callable[[Location, Report], Adapter]
    writing: Callable[[NewAdapter, Path, Mapping[str, Any]], AbstractContextManager[Put]]
    files: tuple[str, ...]
    weights: str
    library: str | None = None
    check: Callable[[Path], None] = lambda folder: None


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            name="peft",
            summary=f"PEFT LoRA ({peft.CONFIG}, {peft.WEIGHTS})",
            recognises=peft.recognises,
            read=peft.read,
            writing=peft.writing,
            files=peft.FILES,
            weights=peft.WEIGHTS,
            library="peft",
            check=peft.check,
        ),
        Format(
            name="kohya",
            summary=f"kohya LoRA ({kohya.WEIGHTS}, or name its file)",
            recognises=kohya.recognises,
            read=kohya.read,
            writing=kohya.writing,
            files=kohya.FILES,
            weights=kohya.WEIGHTS,
        ),
    )
}

#: Every file of an adapter that fedlora can have written, in whichever format.
FILES = frozenset(name for one in FORMATS.values() for name in one.files)


def inside(folder: Location, adapter: str | None) -> Location:
    """Where the adapter of that name is in a client's folder; None is the folder itself.

    Of all that a name with `*` fits, it is the last one, 9 before 10. Nothing is read.
    """
    if adapter is None:
        return folder
    if "*" not in adapter:
        return folder / adapter
    try:
        fitting = [one for one in folder.glob(adapter) if is_adapter(one)]
    except (OSError, InputError):
        fitting = []
    return max(fitting, key=lambda one: natural(one.name), default=folder / adapter)


def is_adapter(path: Location) -> bool:
    """Whether any format takes this folder or file for one of its adapters, whole or damaged."""
    return any(known.recognises(path) for known in FORMATS.values())


def read(path: Location, report: Report = refuse) -> Adapter:
    """The adapter in a folder, or one that is a file; headers only. Raises InputError.

    Every fault goes to `report`; if that returns, the adapter is what is left without it.
    """
    for known in FORMATS.values():
        if known.recognises(path):
            return known.read(path, report)
    if not path.is_dir():
        raise InputError(path, "no such folder", "check the path")
    names = ", or ".join(known.summary for known in FORMATS.values())
    raise InputError(path, "no adapter in this folder", f"it must hold: {names}")
