"""Folders in memory, which readers and writers use like folders on a disk."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from fedlora_cli.files.writing import declare, layout_of, stored
from fedlora_cli.remote import Remote

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MemoryFile:
    """A file of `size` bytes; `read(start, end)` returns some of them."""

    size: int
    read: Callable[[int, int], bytes]


def file_of(content: bytes) -> MemoryFile:
    """A file with this content."""
    return MemoryFile(len(content), lambda start, end: content[start:end])


def weights_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> MemoryFile:
    """A safetensors file of these tensors, of which each read copies the part that it asks for.

    Its bytes are those of `files.writing.write`. Tensors that are not contiguous, or on a GPU, are
    copied for each read. Raises OutputError for a header that is too large.

    >>> import torch
    >>> file = weights_of({"B": torch.ones(2), "A": torch.zeros(3)}, {})
    >>> file.read(file.size - 8, file.size) == torch.ones(2).numpy().tobytes()
    True
    """
    header, places = layout_of({name: declare(t) for name, t in tensors.items()}, metadata)
    in_order = sorted(places, key=places.__getitem__)
    starts = [0, *(places[name] for name in in_order)]
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())

    def read(start: int, end: int) -> bytes:
        first, last = bisect_right(starts, start) - 1, bisect_left(starts, end)
        pieces = (
            memoryview(header) if k == 0 else stored(tensors[in_order[k - 1]])
            for k in range(first, last)
        )
        return b"".join(
            piece[max(0, start - starts[k]) : max(0, end - starts[k])]
            for k, piece in enumerate(pieces, first)
        )

    return MemoryFile(size, read)


@dataclass(frozen=True, eq=False)
class Folders:
    """A store of folders in memory, as `remote.Remote` uses it: a tree of files by name.

    In `clients/`, each folder is a client's.
    """

    tree: dict[str, Any] = field(default_factory=dict)

    def place(self, folder: str) -> Remote:
        """The folder as a path."""
        return Remote("memory", folder, memory=self)

    def label(self, key: str) -> str:
        """The name of a place in messages.

        >>> Folders().label("clients/ann/adapter_config.json"), Folders().label("previous")
        ('client ann', 'previous')
        """
        home, _, rest = key.partition("/")
        return f"client {rest.partition('/')[0]}" if home == "clients" and rest else home

    def add(self, key: str, file: MemoryFile) -> None:
        """Store a file, in folders that are made as needed."""
        *folders, name = key.split("/")
        inside = self.tree
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[name] = file

    @contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        """A new file for the block to write, which exists afterwards."""
        buffer = io.BytesIO()
        yield buffer
        content = buffer.getbuffer()
        self.add(key, MemoryFile(len(content), lambda start, end: bytes(content[start:end])))

    def ls(self, key: str, detail: bool) -> list[dict[str, Any]]:
        """The entries of a folder. Raises FileNotFoundError."""
        return [_entry(f"{key}/{name}", inside) for name, inside in self._at(key).items()]

    def info(self, key: str) -> dict[str, Any]:
        """The entry of a file or folder. Raises FileNotFoundError."""
        return _entry(key, self._at(key))

    def cat_file(self, key: str, start: int, end: int) -> bytes:
        """Some bytes of a file. Raises FileNotFoundError."""
        content: bytes = self._at(key).read(start, end)
        return content

    def _at(self, key: str) -> Any:
        inside: Any = self.tree
        for name in key.split("/"):
            if not isinstance(inside, dict) or name not in inside:
                raise FileNotFoundError(key)
            inside = inside[name]
        return inside


def _entry(key: str, inside: Any) -> dict[str, Any]:
    if isinstance(inside, dict):
        return {"name": key, "type": "directory"}
    return {"name": key, "type": "file", "size": inside.size}
