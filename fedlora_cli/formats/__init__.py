"""The table of on-disk formats. A format is one file, or one package, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, NewAdapter, TensorWriter
from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.formats import diffusers, kohya, mlx, peft, single
from fedlora_cli.formats.beside import left_out
from fedlora_cli.formats.single import LoraFile
from fedlora_cli.remote import Location
from fedlora_cli.text import natural


@dataclass(frozen=True)
class OneFile:
    """How a format that is one file of weights is told and read: `owns` looks at the name of a
    tensor, `read` takes the header.
    """

    owns: Callable[[str], bool]
    read: Callable[[LoraFile, FaultHandler], Adapter]


@dataclass(frozen=True)
class Format:
    """One format. `writing` takes the pieces of an adapter into an existing folder, and `check_new`
    raises InputError and OutputError where nothing could read what it would write. `files` are all
    that a folder of this format can hold when fedlora wrote it, `weights` is the one with the
    tensors. `library` is what model hubs call the library that loads it, where one does. `check`
    raises InputError where that library would not load all that a folder holds. `one_file` is None
    for PEFT's folders, which the names of their files tell.
    """

    name: str
    summary: str
    writing: Callable[[NewAdapter, Path, Mapping[str, Any]], AbstractContextManager[TensorWriter]]
    check_new: Callable[[NewAdapter, Mapping[str, Any]], None]
    files: tuple[str, ...]
    weights: str
    library: str | None = None
    check: Callable[[Path], None] = lambda folder: None
    one_file: OneFile | None = None


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            name="peft",
            summary=f"PEFT LoRA ({peft.CONFIG}, {peft.WEIGHTS})",
            writing=peft.writing,
            check_new=peft.check_new,
            files=peft.FILES,
            weights=peft.WEIGHTS,
            library="peft",
            check=peft.check,
        ),
        Format(
            name="kohya",
            summary=f"kohya LoRA ({kohya.WEIGHTS}, or name its file)",
            writing=kohya.writing,
            check_new=kohya.check_new,
            files=kohya.FILES,
            weights=kohya.WEIGHTS,
            one_file=OneFile(kohya.owns, kohya.read),
        ),
        Format(
            name="diffusers",
            summary=f"diffusers LoRA ({diffusers.WEIGHTS}, or name its file)",
            writing=diffusers.writing,
            check_new=diffusers.check_new,
            files=diffusers.FILES,
            weights=diffusers.WEIGHTS,
            library="diffusers",
            one_file=OneFile(diffusers.owns, diffusers.read),
        ),
    )
}

#: Every file of an adapter that fedlora can have written, in whichever format.
FILES = frozenset(name for one in FORMATS.values() for name in one.files)

#: The formats that are one file, under whatever name, and the names that one has in a folder.
_ONE_FILE = {one.weights: one.one_file for one in FORMATS.values() if one.one_file is not None}


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
    """Whether any format takes this folder or file for one of its adapters, whole or damaged. Only
    names are looked at.
    """
    return peft.recognises(path) or bool(single.weights_in(path, _ONE_FILE))


def read(path: Location, on_fault: FaultHandler = raise_fault) -> Adapter:
    """The adapter in a folder, or one that is a file; headers only. Raises InputError.

    Every fault goes to `on_fault`; if that returns, the adapter is what is left without it.
    """
    if peft.recognises(path):
        return _with_remark(peft.read(path, on_fault))
    weights = single.the_weights(path, _ONE_FILE)
    if weights is not None:
        return _with_remark(_read_file(single.read_header(path, weights, on_fault), on_fault))
    if not path.is_dir():
        raise InputError(path, "no such folder", "check the path")
    names = ", or ".join(known.summary for known in FORMATS.values())
    raise InputError(path, "no adapter in this folder", f"it must hold: {names}")


def _read_file(file: LoraFile, on_fault: FaultHandler) -> Adapter:
    if mlx.has_factors(file.entries):
        on_fault(InputError(file.weights, mlx.FOUND, mlx.CURE))
        return Adapter(file.path, file.weights, {}, {}, AdapterMetadata())
    return _owner(file).read(file, on_fault)


def _owner(file: LoraFile) -> OneFile:
    """The format that owns a tensor of this file, or the first one, to say that there is none."""
    formats = list(_ONE_FILE.values())
    return next((one for one in formats if any(map(one.owns, file.entries))), formats[0])


def _with_remark(adapter: Adapter) -> Adapter:
    """The adapter with a remark about other weights in its folder; a file has none.

    Where nothing could be read, they may be what is missing.
    """
    if adapter.path == adapter.weights_file or not (adapter.modules or adapter.tensors):
        return adapter
    beside = left_out(adapter.path, adapter.weights_file.name)
    return replace(adapter, notes=(*adapter.notes, *beside))
