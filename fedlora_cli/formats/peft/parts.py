"""A limit on the parts of one file's tensors: experts of a pair, rows of a tensor of tokens.

Each part becomes a module or a tensor, which takes about 1 kB, and 4 kB in a whole command. A few
bytes of a hostile config could otherwise claim thousands of parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location

#: The most parts: a model with 128 experts in each of 94 layers, two pairs each, has 24 000.
MOST_PARTS = 150_000

#: Parts that the smallest file may have.
_FREE = 4_096

#: Bytes of the file per further part. An expert of rank 8 has 45 000 in the model above.
_BYTES = 128


@dataclass
class Parts:
    """The number of parts that the tensors of one file may still have."""

    where: Location
    left: int

    @classmethod
    def of(cls, where: Location, size: int) -> Parts:
        """The limit for a file of `size` bytes.

        >>> from pathlib import Path
        >>> [Parts.of(Path("x"), size).left for size in (0, 12_800, 2**40)]
        [4096, 4196, 150000]
        """
        return cls(where, min(MOST_PARTS, _FREE + size // _BYTES))

    def take(self, count: int, name: str, what: str) -> None:
        """Count the parts of one tensor. Raises InputError if the file has too many."""
        if count > self.left:
            found = f"{name} has {count} {what}, too many for the size of the file"
            raise InputError(self.where, found, "correct r, target_parameters or the tokens")
        self.left -= count
