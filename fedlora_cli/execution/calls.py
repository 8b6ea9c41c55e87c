"""Calls and results sent between processes: plain pickles with tensors as bytes.

Only the program's own pickles are loaded. Files from clients are never unpickled.
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
from fedlora_cli.text import first_line
from fedlora_cli.version import __version__

if TYPE_CHECKING:
    from torch import Tensor


def versions_here() -> tuple[str, ...]:
    """The versions on which the bytes of a result depend."""
    torch, numpy = (metadata.version(name).partition("+")[0] for name in ("torch", "numpy"))
    return (f"fedlora {__version__}", f"torch {torch}", f"numpy {numpy}")


def run_elsewhere(call: bytes, versions: tuple[str, ...]) -> bytes:
    """`run_here` for a worker that may be on another machine, in another folder."""
    place, installed = f"worker on {platform.node()}", versions_here()
    if installed != versions:
        found = f"the worker has {', '.join(installed)}, this machine has {', '.join(versions)}"
        cure = "install the same versions on all machines"
        return packed((None, ClusterError(place, found, cure)))
    result, error = _outcome(call)
    path = error.path if isinstance(error, InputError) else None
    # Path.exists raises if a parent folder may not be entered.
    if isinstance(path, Path) and not os.path.exists(path):  # noqa: PTH110
        found = f"the {place} cannot find it"
        cure = "share the folder with all workers at the same path, or give "
        error = InputError(path, found, f"{cure}URLs such as s3://")
    elif isinstance(path, Path) and error is not None and error.found.startswith("changed"):
        cure = f"{error.cure}; if the {place} has a copy, share the folder instead"
        error = InputError(path, error.found, cure)
    return packed((result, error))


def run_here(call: bytes) -> bytes:
    """Call a packed function with its packed argument. Returns the packed result and FedloraError.

    The error is returned, because Dask would repeat and log a call that raises.
    """
    return packed(_outcome(call))


def _outcome(call: bytes) -> tuple[Any, FedloraError | None]:
    import torch

    # With one thread, sums are always split the same way. Not reset: other calls may be running.
    torch.set_num_threads(1)
    try:
        function, item = unpacked(call)
        return function(item), None
    except FedloraError as error:
        return None, error


def unpacked(value: bytes) -> Any:
    """The value of a pickle of this program. Raises ClusterError if this process cannot import a
    function in it.
    """
    try:
        return pickle.loads(value)  # noqa: S301 - written by this program
    except (ImportError, AttributeError) as error:
        found = f"it cannot import a function ({first_line(error)})"
        raise ClusterError(f"worker on {platform.node()}", found, _IMPORTABLE) from None


_IMPORTABLE = "define the functions of a method in a module that all workers can import"


def taken(outcome: bytes) -> Any:
    """Unpack a result, or raise its error."""
    result, error = pickle.loads(outcome)  # noqa: S301 - written by this program
    if error is not None:
        raise error
    return result


def packed(value: object, home: Path | None = None) -> bytes:
    """A pickle with tensors as bytes.

    torch would pickle the whole memory behind a view, or use shared memory, which is small in
    containers. With `home`, paths relative to it are written in full. Raises UsageError for
    memory:// places, which only this process has, and for functions that are in no module.
    """
    import torch

    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _reduced, Remote: _seen}
    if home is not None:
        pickler.dispatch_table[type(home)] = lambda path: (Path, (str(home / path),))
    try:
        pickler.dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        found = f"they cannot be sent to other processes ({first_line(error)})"
        raise UsageError("the functions of the method", found, _IMPORTABLE) from None
    return file.getvalue()


def _seen(place: Remote) -> Any:
    if place.protocol == "memory":
        found = f"{place} is in the memory of this process"
        cure = "leave --cluster out, or give files that all workers see"
        raise UsageError("--cluster", found, cure)
    return place.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return _tensor, (bytearray(flat.numpy()), tensor.dtype, tuple(tensor.shape))


def _tensor(content: bytearray, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    import torch

    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
