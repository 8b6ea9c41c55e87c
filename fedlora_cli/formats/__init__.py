"""The table of on-disk formats. A new format needs one file or package, and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, NewAdapter, TensorWriter
from fedlora_cli.errors import FaultHandler, InputError, raise_fault
from fedlora_cli.formats import diffusers, kohya, mlx, peft, single
from fedlora_cli.formats.beside import other_weights
from fedlora_cli.formats.single import LoraFile, NewFile
from fedlora_cli.remote import Location
from fedlora_cli.text import natural


class OneFile(Protocol):
    """The module of a format that is one weights file. `owns` recognizes it by a tensor's name."""

    WEIGHTS: str

    def owns(self, key: str) -> bool: ...
    def read(self, file: LoraFile, on_fault: FaultHandler) -> Adapter: ...
    def new_file(self, adapter: NewAdapter, provenance: Mapping[str, Any]) -> NewFile: ...


@dataclass(frozen=True)
class Format:
    """An on-disk format of adapters.

    - `writing`: writes the modules and tensors of an adapter into an existing folder.
    - `check_new`: raises InputError or OutputError if no reader could load the written adapter.
    - `weights`: the name of the weights file.
    - `library`: the library that loads the format, by its name on model hubs.
    - `check`: raises InputError if that library would not load every tensor of a folder.
    """

    name: str
    summary: str
    writing: Callable[
        [NewAdapter, Location, Mapping[str, Any]], AbstractContextManager[TensorWriter]
    ]
    check_new: Callable[[NewAdapter, Mapping[str, Any]], None]
    weights: str
    library: str | None = None
    check: Callable[[Location], None] = lambda folder: None


def _one_file(name: str, module: OneFile, library: str | None) -> Format:
    return Format(
        name=name,
        summary=f"{name} LoRA ({module.WEIGHTS}, or name its file)",
        writing=lambda adapter, folder, provenance: module.new_file(adapter, provenance).writing(
            folder / module.WEIGHTS
        ),
        check_new=lambda adapter, provenance: module.new_file(adapter, provenance).check(),
        weights=module.WEIGHTS,
        library=library,
    )


_PEFT = Format(
    name="peft",
    summary=f"PEFT LoRA ({peft.CONFIG}, {peft.WEIGHTS})",
    writing=peft.writing,
    check_new=peft.check_new,
    weights=peft.WEIGHTS,
    library="peft",
    check=peft.check,
)
#: The formats that are one weights file: the name, the module, and the library or None.
_MODULES: tuple[tuple[str, OneFile, str | None], ...] = (
    ("kohya", kohya, None),
    ("diffusers", diffusers, "diffusers"),
)

FORMATS = {known.name: known for known in (_PEFT, *(_one_file(*row) for row in _MODULES))}

#: Every file that fedlora can have written into an adapter folder, in all formats.
FILES = frozenset({peft.CONFIG, "README.md", "fedlora.json"}) | {
    known.weights for known in FORMATS.values()
}

#: The modules of the single-file formats, by the name of the file in a folder.
_ONE_FILE = {module.WEIGHTS: module for _, module, _ in _MODULES}


def inside(folder: Location, adapter: str | None) -> Location:
    """The path of the adapter with this name in a client's folder; None is the folder itself.

    A name with `*` takes the last match in natural order (9 before 10). No file is read.
    """
    if adapter is None:
        return folder
    if "*" not in adapter:
        return folder / adapter
    try:
        matches = [path for path in folder.glob(adapter) if is_adapter(path)]
    except (OSError, InputError):
        matches = []
    return max(matches, key=lambda path: natural(path.name), default=folder / adapter)


def is_adapter(path: Location) -> bool:
    """Whether the names of files show an adapter of any format, complete or damaged."""
    return peft.is_peft(path) or bool(single.weights_in(path, _ONE_FILE))


def read(path: Location, on_fault: FaultHandler = raise_fault) -> Adapter:
    """The adapter in a folder or a file; only headers are read. Raises InputError.

    Every fault goes to `on_fault`; if that returns, the adapter lacks the part at fault.
    """
    if peft.is_peft(path):
        return _with_remark(peft.read(path, on_fault))
    files = single.weights_in(path, _ONE_FILE)
    if len(files) > 1:
        found = f"both {files[0].name} and {files[1].name} in it"
        raise InputError(path, found, "keep one adapter in one folder")
    if files:
        return _with_remark(_read_file(single.read_header(path, files[0], on_fault), on_fault))
    if not path.is_dir():
        raise InputError(path, "no such folder", "check the path")
    names = ", or ".join(known.summary for known in FORMATS.values())
    raise InputError(path, "no adapter in this folder", f"it must hold: {names}")


def _read_file(file: LoraFile, on_fault: FaultHandler) -> Adapter:
    if mlx.has_factors(file.tensors):
        on_fault(InputError(file.weights, mlx.FOUND, mlx.CURE))
        return Adapter(file.path, file.weights, {}, {}, AdapterMetadata())
    # Without an owner, the first format reports the tensors as unknown.
    readers = [*_ONE_FILE.values()]
    owner = next((r for r in readers if any(map(r.owns, file.tensors))), readers[0])
    return owner.read(file, on_fault)


def _with_remark(adapter: Adapter) -> Adapter:
    """The adapter with a remark about other weights in its folder.

    A file has no remark, nor has an adapter of which nothing could be read: the other weights may
    be the missing ones.
    """
    if adapter.path == adapter.weights_file or not (adapter.modules or adapter.tensors):
        return adapter
    remark = other_weights(adapter.path, adapter.weights_file.name)
    return replace(adapter, notes=(*adapter.notes, *remark))
