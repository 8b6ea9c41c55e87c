"""How many parts the tensors of one file may have: experts of a pair, rows of a tensor of tokens.

A part becomes a module or a tensor of its own here, of about 1 kB, and 4 kB in a whole command.
The config tells how many there are: one string in it makes thousands of a few bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location

#: Far more than any model has: 128 experts in each of 94 layers, two pairs each, are 24 000.
MOST_PARTS = 150_000

#: So many are welcome in the smallest file.
_FREE = 4_096

#: Bytes of the file for each further part. An expert of rank 8 has 45 000 in the model above.
_BYTES = 128


@dataclass
class Parts:
    """How many more parts the tensors of one file may have."""

    where: Location
    left: int

    @classmethod
    def of(cls, where: Location, size: int) -> Parts:
        """For a file of that many bytes.

        >>> from pathlib import Path
        >>> [Parts.of(Path("x"), size).left for size in (0, 12_800, 2**40)]
        [4096, 4196, 150000]
        """
        return cls(where, min(MOST_PARTS, _FREE + size // _BYTES))

    def take(self, count: int, name: str, what: str) -> None:
        """Count the parts of one tensor. Raises InputError where the file has too many."""
        if count > self.left:
            found = f"{name} has {count} {what}, too many for the size of the file"
            raise InputError(self.where, found, "correct r, target_parameters or the tokens")
        self.left -= count
