"""The majority among adapters that disagree, which decides which adapters are at fault.

The adapters that differ from a strict majority are at fault. Without one, no adapter is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.errors import FaultHandler, InputError
from fedlora_cli.remote import Location

T = TypeVar("T")


class Undecided(InputError):
    """Adapters disagree without a majority: the place is a text, because no adapter is at fault."""


@dataclass(frozen=True)
class Majority(Generic[T]):
    """The most frequent value and the first adapter with it.

    It decides which adapters are at fault if more than half of the adapters with a value have it.
    """

    value: T
    example: Adapter
    decides: bool

    def fault(self, place: Location, found: str, cure: str) -> InputError:
        """The error of an adapter with another value; `found` may name the example's path."""
        return fault_for(place, found, cure, self.example, decided=self.decides)


def majority(values: Sequence[tuple[T, Adapter]]) -> Majority[T]:
    """The majority of these values."""
    most, votes = Counter(value for value, _ in values).most_common(1)[0]
    example = next(adapter for value, adapter in values if value == most)
    return Majority(most, example, decides=2 * votes > len(values))


def fault_for(
    place: Location, found: str, cure: str, example: Adapter, *, decided: bool
) -> InputError:
    """The error of the adapter at `place`, which is at fault only if the majority has `decided`."""
    if decided:
        return InputError(place, found, cure, {example.path: None})
    return Undecided(str(place), found, cure, {example.path: None})


def exclude(
    side: tuple[Collection[Adapter], str],
    other_side: tuple[Collection[Adapter], str],
    cure: str,
    on_fault: FaultHandler,
) -> None:
    """Report the adapters on the smaller of two sides that exclude each other.

    Each side is its adapters and the message for them, which ends before the path of an adapter on
    the other side. An adapter on both sides is at fault. With sides of equal size, no adapter is.
    """
    both = set(side[0]) & set(other_side[0])
    for adapter in (adapter for adapter in side[0] if adapter in both):
        found = f"{side[1]} {adapter.path}"
        on_fault(InputError(adapter.weights_file, found, cure, {adapter.path: None}))
    sides = [
        ([adapter for adapter in adapters if adapter not in both], found)
        for adapters, found in (side, other_side)
    ]
    (fewer, found), (others, _) = sorted(sides, key=lambda side: len(side[0]))
    decided = len(fewer) < len(others)
    for adapter in fewer:
        text = f"{found} {others[0].path}"
        on_fault(fault_for(adapter.weights_file, text, cure, others[0], decided=decided))


def agreed(adapters: Sequence[Adapter], name: str, cure: str, on_fault: FaultHandler) -> Any:
    """The value of a metadata field that all adapters with a value agree on; None without any."""
    pairs = [(getattr(adapter.metadata, name), adapter) for adapter in adapters]
    values = [(value, adapter) for value, adapter in pairs if value is not None]
    if not values:
        return None
    most = majority(values)
    for value, adapter in values:
        if value != most.value:
            label = name.replace("_", " ")
            verb = "are" if isinstance(value, tuple) and label.endswith("s") else "is"
            found = f"its {label} {verb} {_text(value)}, but {_text(most.value)} in "
            found += str(most.example.path)
            on_fault(most.fault(adapter.path, found, cure))
    return most.value


def _text(value: Any) -> str:
    """A metadata value in an error."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))[:200] or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)[:200]
