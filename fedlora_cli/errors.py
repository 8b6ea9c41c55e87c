"""Errors, each with the exit code of the command, and the handlers that receive them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedlora_cli.remote import Location, Remote, normal
from fedlora_cli.text import printable


def innermost(error: BaseException) -> BaseException:
    """The first error in a chain of causes.

    >>> outer = ValueError("cannot be read")
    >>> outer.__cause__ = KeyError("columns")
    >>> innermost(outer)
    KeyError('columns')
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return error


#: Longest description of a fault, in characters: a name in an untrusted file may be megabytes long.
_LONGEST = 1000

_FLAG = re.compile(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)")


class FedloraError(Exception):
    """An error as one printable line: where it happened, what was found, what to do.

    - `path`: the file or folder at fault; None if the error is about something else.
    - `places`: paths inside `found`, each with its replacement in reports, or None for its name.
      Reports travel to other machines, so they must not show local paths.
    - `found`: the description with the replacements. `here`: the description with full paths.

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
        """The description, with each path replaced by `name(path)` or by its own replacement."""
        found = self._whole
        for place, word in self._places.items():
            shown = name(place) if word is None else word
            # A path may be a single letter, so only whole words and path prefixes are replaced.
            whole = rf"(?<!\S){re.escape(str(place))}(?![^\s,;:/])"
            found = re.sub(whole, lambda _, shown=shown: shown, found)  # type: ignore[misc]
        return _shown(found)

    def with_cure(self, cure: str) -> InputError:
        """An InputError with the same description and another remedy."""
        return InputError(self.path or self.where, self._whole, cure, self._places)

    def in_python(self) -> FedloraError:
        """The same error, with the names of arguments instead of the command's options."""
        where = self.path or in_python(self.where)
        return type(self)(where, in_python(self._whole), in_python(self.cure), self._places)

    def __reduce__(self) -> tuple[type[FedloraError], tuple[object, ...]]:
        """The arguments from which pickle makes the same error in another process."""
        return type(self), (self.path or self.where, self._whole, self.cure, self._places)


def in_python(text: str) -> str:
    """A message with the names of Python's arguments instead of the command's options.

    >>> in_python("give --dora approximate, or leave --max-rank out")
    'give dora approximate, or leave max_rank out'
    """
    return _FLAG.sub(lambda flag: flag[1].replace("-", "_"), text)


def _shown(found: str) -> str:
    """The description on one printable line of limited length."""
    return printable(found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…")


class UsageError(FedloraError):
    """The options contradict each other or the chosen method."""

    exit_code = 2


class MethodError(UsageError):
    """A method from outside is broken: it cannot be loaded, or its functions fail."""


class InputError(FedloraError):
    """An input file is missing, damaged, unsupported, or does not fit the other files."""

    exit_code = 3


class NotFinite(InputError):
    """Weights are NaN or infinite, or overflow: the training has diverged."""


def without_norm(adapter: object, module: str) -> NotFinite:
    """The error for finite factors whose product overflows.

    >>> without_norm("round-01/ann", "q_proj").found
    'the update of q_proj is larger than any number'
    """
    found = f"the update of {module} is larger than any number"
    return NotFinite(adapter, found, "leave this adapter out")


class OutputError(FedloraError):
    """The result cannot be written to the output path."""

    exit_code = 4


class ClusterError(FedloraError):
    """A cluster or one of its workers cannot be reached, or was lost."""

    exit_code = 4


class VerificationError(FedloraError):
    """The written files do not hold the update that was computed."""

    exit_code = 5


def require(holds: bool, flag: str, value: object, range_: str) -> None:
    """Raise UsageError unless `holds`: the value of an option is out of its range."""
    if not holds:
        raise UsageError(flag, f"{value} is out of range", f"it must be {range_}")


#: Called for every fault. It may raise (strict) or return (collect). If it returns, reading goes on
#: with what is usable; follow-up failures raise the same error object again, so only new objects
#: are new faults.
FaultHandler = Callable[[InputError], None]


def raise_fault(error: InputError) -> None:
    """The strict fault handler: raise the first fault."""
    raise error


def recording(on_fault: FaultHandler, kept: list[InputError]) -> FaultHandler:
    """A fault handler that appends each fault to `kept` and passes it on to `on_fault`."""

    def keep(error: InputError) -> None:
        kept.append(error)
        on_fault(error)

    return keep


@contextmanager
def catching_faults(on_fault: FaultHandler) -> Iterator[None]:
    """Pass an InputError that ends the block to `on_fault`, and continue after the block.

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
