"""What can go wrong, and the exit code each kind of failure ends the command with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedlora_cli.remote import Location, Remote, normal
from fedlora_cli.text import printable


def innermost(error: BaseException) -> BaseException:
    """The error that the others were raised from.

    >>> outer = ValueError("cannot be read")
    >>> outer.__cause__ = KeyError("columns")
    >>> innermost(outer)
    KeyError('columns')
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return error


#: Letters of what was found: names in an untrusted file may be as long as the file.
_LONGEST = 1000


class FedloraError(Exception):
    """Where it happened, what was found, and what to do: always one printable line.

    `path` is the file or folder that it happened in, None where that is something else. `places`
    are those that the line speaks of, each with what `found` has in place of it, None where that is
    its name: what was found stands in reports, which travel, and say nothing of this disk. `here`
    is what was found with the places as they are.

    >>> str(InputError("adapter_config.json", "r is -4", "write the rank it was trained with"))
    'adapter_config.json: r is -4; write the rank it was trained with'
    """

    exit_code = 3

    def __init__(
        self,
        where: object,
        found: str,
        cure: str,
        places: Mapping[Location, str | None] | None = None,
    ) -> None:
        self.path = where if isinstance(where, (Path, Remote)) else None
        self.where, self.cure = printable(where), printable(cure)
        self._whole, self._places = found, places or {}
        self.here = _shown(found)
        self.found = self.reported(
            lambda place: str(place) if isinstance(place, Remote) else normal(place).name
        )
        super().__init__(f"{self.where}: {self.here}; {self.cure}")

    def reported(self, name: Callable[[Location], str]) -> str:
        """What was found, with the places by these names."""
        found = self._whole
        for place, word in self._places.items():
            said = name(place) if word is None else word
            # A path may be as short as a letter: it is whole words, or what a longer one begins by.
            whole = rf"(?<!\S){re.escape(str(place))}(?![^\s,;:/])"
            found = re.sub(whole, lambda _, said=said: said, found)  # type: ignore[misc]
        return _shown(found)

    def with_cure(self, cure: str) -> InputError:
        """The same found in a file that was read, with another way out."""
        return InputError(self.path or self.where, self._whole, cure, self._places)

    def __reduce__(self) -> tuple[type[FedloraError], tuple[object, ...]]:
        """What another process makes the same error from."""
        return type(self), (self.path or self.where, self._whole, self.cure, self._places)


def _shown(found: str) -> str:
    """What was found, on one line that is not too long."""
    return printable(found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…")


class UsageError(FedloraError):
    """The options contradict each other or the chosen method."""

    exit_code = 2


class InputError(FedloraError):
    """A file that was read is missing, damaged, unsupported, or does not fit the others."""

    exit_code = 3


class NotFinite(InputError):
    """Values beyond the range of numbers: what training that diverged leaves."""


def without_norm(adapter: object, module: str) -> NotFinite:
    """The error of finite factors whose product overflows.

    >>> without_norm("round-01/ann", "q_proj").found
    'the update of q_proj is larger than any number'
    """
    found = f"the update of {module} is larger than any number"
    return NotFinite(adapter, found, "leave this adapter out")


class OutputError(FedloraError):
    """The result could not be written where it was asked for."""

    exit_code = 4


class ClusterError(FedloraError):
    """Who was to compute could not be reached, or was lost."""

    exit_code = 4


class VerificationError(FedloraError):
    """What was written is not the update that was asked for."""

    exit_code = 5


def require(holds: bool, flag: str, value: object, range_: str) -> None:
    """Whether an option's value is in its range. Raises UsageError."""
    if not holds:
        raise UsageError(flag, f"{value} is out of range", f"it must be {range_}")


#: Told about bad input by whoever reads it. If it returns, what can still be read is read; what
#: rests on something broken ends by the very same error, so that a fault is told apart from its
#: consequences by being new.
FaultHandler = Callable[[InputError], None]


def raise_fault(error: InputError) -> None:
    """The report of those who need all of it: the first fault is the end. Raises it."""
    raise error


def recording(on_fault: FaultHandler, kept: list[InputError]) -> FaultHandler:
    """The same report, with a list of what it was told."""

    def keep(error: InputError) -> None:
        kept.append(error)
        on_fault(error)

    return keep


@contextmanager
def catching_faults(on_fault: FaultHandler) -> Iterator[None]:
    """What can go wrong on its own: an InputError ends the block, and goes to the report.

    >>> found: list[InputError] = []
    >>> with catching_faults(found.append):
    ...     raise InputError("adapter_config.json", "r is -4", "correct it")
    >>> found[0].found
    'r is -4'
    """
    try:
        yield
    except InputError as error:
        on_fault(error)
