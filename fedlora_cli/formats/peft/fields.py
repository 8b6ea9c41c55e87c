"""Typed access to the fields of an `adapter_config.json`, which may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedlora_cli.errors import InputError

T = TypeVar("T")

#: PEFT refuses to load any other.
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

#: Characters of a path, which a base model may be.
_LONGEST = 4096

#: Far above any alpha, and far below what would make an update overflow.
LARGEST_ALPHA = 1e12


class Fields:
    """Typed access to the fields of one config; remembers which were asked for."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.seen: set[str] = set()

    def _get(self, name: str) -> Any:
        self.seen.add(name)
        return self.raw.get(name)

    def _refuse(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(self.path, f"{name} is {repr(value)[:80]}", f"it must be {wanted}")

    def natural_value(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= LARGEST_ALPHA:
            raise self._refuse(name, value, "a whole number, 1 or more")
        return value

    def positive_value(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value <= LARGEST_ALPHA:
            raise self._refuse(name, value, f"a positive number, at most {LARGEST_ALPHA:g}")
        return float(value)

    def natural(self, name: str, default: int) -> int:
        value = self._get(name)
        return default if name not in self.raw else self.natural_value(name, value)

    def positive(self, name: str, default: float) -> float:
        value = self._get(name)
        return default if name not in self.raw else self.positive_value(name, value)

    def dropout(self, name: str) -> float:
        value = self._get(name)
        if value is None:
            return 0.0
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self._refuse(name, value, "a probability")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._refuse(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self._get(name)
        if value is not None and (not isinstance(value, str) or len(value) > _LONGEST):
            raise self._refuse(name, value, f"text of at most {_LONGEST} characters")
        return value or None

    def task_type(self, name: str) -> str | None:
        value = self.text(name)
        if value is not None and value not in TASK_TYPES:
            raise self._refuse(name, value, f"one of {', '.join(TASK_TYPES)}")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of names; one name alone counts as a list of one."""
        value = self._get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(i, str) and i for i in value):
            raise self._refuse(name, value, "a list of module names")
        return tuple(value)

    def names(self, name: str) -> str | frozenset[str] | None:
        """A regular expression, a set of names, or None."""
        value = self._get(name)
        return value if value is None or isinstance(value, str) else frozenset(self.strings(name))

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self._get(name)
        if value is None or type(value) is int:
            return None if value is None else (value,)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._refuse(name, value, "a list of layer numbers")
        return tuple(value) or None

    def pattern(self, name: str, check: Callable[[str, Any], T]) -> dict[str, T]:
        value = self._get(name) or {}
        if not isinstance(value, dict):
            raise self._refuse(name, value, "an object of patterns")
        return {key: check(f"{name}[{key!r}]", item) for key, item in value.items()}
