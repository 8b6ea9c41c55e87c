"""Calls and results on their way between processes: plain pickles, tensors in them as their bytes.

They are the program's own. Clients' files are read on the worker, by position, and never unpickled.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.errors import ClusterError, FedloraError, InputError, UsageError
from fedlora_cli.remote import Remote
from fedlora_cli.version import __version__

if TYPE_CHECKING:
    from torch import Tensor


def versions_here() -> tuple[str, ...]:
    """What the bytes of a result depend on."""
    libraries = (
        f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", "numpy")
    )
    return (f"fedlora {__version__}", *libraries)


def run_elsewhere(call: bytes, versions: tuple[str, ...]) -> bytes:
    """`run_here` for a worker that may be another machine, in another folder."""
    place, own = f"worker on {platform.node()}", versions_here()
    if own != versions:
        found = f"{', '.join(own)}, where {', '.join(versions)} asks"
        cure = "install the same versions on all machines"
        return packed((None, ClusterError(place, found, cure)))
    result, error = _outcome(call)
    path = error.path if isinstance(error, InputError) else None
    # Path.exists raises where a folder on the way may not be entered.
    if isinstance(path, Path) and not os.path.exists(path):  # noqa: PTH110
        found = f"not to be found by the {place}"
        cure = "all workers must see the same files at the same path: share the folder, or give "
        error = InputError(path, found, f"{cure}URLs such as s3://")
    elif isinstance(path, Path) and error is not None and error.found.startswith("changed"):
        cure = f"{error.cure}; or the {place} sees a copy, which is another file: share the folder"
        error = InputError(path, error.found, cure)
    return packed((result, error))


def run_here(call: bytes) -> bytes:
    """What a packed pair of a function and its argument gives, and its FedloraError, packed.

    Dask would run what raises an error a second time, and log it.
    """
    return packed(_outcome(call))


def _outcome(call: bytes) -> tuple[Any, FedloraError | None]:
    import torch

    # Sums are never split differently. Not put back: others may be computing in this process.
    torch.set_num_threads(1)
    function, item = pickle.loads(call)  # noqa: S301 - our own
    try:
        return function(item), None
    except FedloraError as error:
        return None, error


def taken(outcome: bytes) -> Any:
    """A result, or its error raised."""
    result, error = pickle.loads(outcome)  # noqa: S301 - our own
    if error is not None:
        raise error
    return result


def packed(value: object, home: Path | None = None) -> bytes:
    """A plain pickle, tensors in it as their bytes: torch would write all memory that a view is a
    part of, or leave it in shared memory, of which containers have little.

    With `home`, paths that are relative to it are written in full. Raises UsageError for places
    that only this process sees.
    """
    import torch

    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _reduced, Remote: _seen}
    if home is not None:
        pickler.dispatch_table[type(home)] = lambda path: (Path, (str(home / path),))
    pickler.dump(value)
    return file.getvalue()


def _seen(place: Remote) -> Any:
    if place.protocol == "memory":
        found = f"{place} is in the memory of this process, where no other sees it"
        raise UsageError("--cluster", found, "leave it out, or give files that all see")
    return place.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return _tensor, (bytearray(flat.numpy()), tensor.dtype, tuple(tensor.shape))


def _tensor(content: bytearray, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    import torch

    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
