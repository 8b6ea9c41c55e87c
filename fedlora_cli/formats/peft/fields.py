"""Typed access to the fields of an `adapter_config.json`, which may hold anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location

T = TypeVar("T")

#: The task types of PEFT, which loads no config with another.
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

#: The biases of the base model that are trained, too.
BIASES = ("none", "all", "lora_only")

#: The modules of transformers with a model's classes, and the names of classes. PEFT imports the
#: module that a config names, so no other module may pass.
_MODEL_MODULE = re.compile(
    r"transformers\.models\.(?!auto\.)([a-z0-9_]{1,100})\.modeling_\1[a-z0-9_]{0,100}"
)
_MODEL_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{0,200}")

#: A token number above every vocabulary.
_LAST_TOKEN = 2**24

#: The most characters of a text: a base model may be a path.
LONGEST_TEXT = 4096

#: The largest alpha: far above any in use, and small enough that no update overflows.
LARGEST_ALPHA = 1e12


class Fields:
    """Typed access to the fields of one config. Every method raises InputError for a bad value;
    `seen` are the names of the fields read so far.
    """

    def __init__(self, path: Location, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.seen: set[str] = set()

    def _get(self, name: str) -> Any:
        self.seen.add(name)
        return self.raw.get(name)

    def _fault(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(self.path, f"{name} is {repr(value)[:80]}", f"it must be {wanted}")

    def natural(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= LARGEST_ALPHA:
            raise self._fault(name, value, "a whole number, 1 or more")
        return value

    def positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value <= LARGEST_ALPHA:
            raise self._fault(name, value, f"a positive number, at most {LARGEST_ALPHA:g}")
        return float(value)

    def checked(self, name: str, check: Callable[[str, Any], T], default: int) -> T | int:
        """The value of a field, checked by `check`; the default if the field is absent."""
        value = self._get(name)
        return check(name, value) if name in self.raw else default

    def _optional(self, name: str, is_valid: Callable[[Any], bool], wanted: str) -> Any:
        """The value of a field that may be null."""
        value = self._get(name)
        if value is not None and not is_valid(value):
            raise self._fault(name, value, wanted)
        return value

    def dropout(self, name: str) -> float:
        numbers = (int, float)
        value = self._optional(name, lambda x: type(x) in numbers and 0 <= x <= 1, "a probability")
        return float(value or 0)

    def boolean(self, name: str) -> bool:
        return bool(self._optional(name, lambda value: type(value) is bool, "true or false"))

    def text(self, name: str) -> str | None:
        wanted = f"text of at most {LONGEST_TEXT} characters"
        return self._optional(name, _is_text, wanted) or None

    def task_type(self, name: str) -> str | None:
        return self.text(name) and self.one_of(name, TASK_TYPES)

    def model_class(self, name: str) -> str | None:
        """The full name of a model's class in transformers; None for any other value."""
        value = self._get(name)
        if not isinstance(value, dict):
            return None
        module, name = (str(value.get(key)) for key in ("parent_library", "base_model_class"))
        valid = _MODEL_MODULE.fullmatch(module) and _MODEL_CLASS.fullmatch(name)
        return f"{module}.{name}" if valid else None

    def strings(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """A list of at most `most` names; a single name counts as a list."""
        value = self._get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(i, str) and i for i in value):
            raise self._fault(name, value, "a list of module names")
        if most is not None and len(value) > most:
            raise self._fault(name, f"a list of {len(value)}", f"a list of at most {most} names")
        return tuple(value)

    def names(self, name: str) -> str | frozenset[str] | None:
        """A regular expression, a set of names, or None."""
        value = self._get(name)
        return value if value is None or isinstance(value, str) else frozenset(self.strings(name))

    def integers(self, name: str) -> frozenset[int] | None:
        """A set of numbers from a list or one number; None if absent or empty."""
        value = self._get(name)
        if value is None or type(value) is int:
            return None if value is None else frozenset([value])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._fault(name, value, "a list of layer numbers")
        return frozenset(value) or None

    def one_of(self, name: str, values: Sequence[str]) -> str:
        """One of these values; the first is the default."""
        wanted = f"one of {', '.join(values)}"
        return str(self._optional(name, lambda value: value in values, wanted) or values[0])

    def tokens_of(self, name: str) -> tuple[int, ...]:
        return self._tokens(name, self._get(name) or [])

    def tokens(self, name: str) -> dict[str, tuple[int, ...]]:
        """Lists of tokens by embedding; a single list has the key ""."""
        value = self._get(name) or {}
        if isinstance(value, list):
            return {"": self._tokens(name, value)}
        if not isinstance(value, dict):
            raise self._fault(name, value, "a list of tokens, or lists by embedding")
        return {key: self._tokens(f"{name}[{key!r}]", item) for key, item in value.items()}

    def _tokens(self, name: str, value: Any) -> tuple[int, ...]:
        whole = isinstance(value, list) and all(type(item) is int for item in value)
        if not whole or not all(0 <= item < _LAST_TOKEN for item in value):
            raise self._fault(name, value, "a list of tokens")
        if len(set(value)) < len(value) and name != "alora_invocation_tokens":
            raise self._fault(name, value, "a list of tokens, each of them once")
        return tuple(value)

    def ranges(self, name: str) -> tuple[tuple[int, int], ...]:
        """A list of pairs of layer numbers."""
        value = self._get(name) or []
        if not isinstance(value, list) or not all(_is_range(item) for item in value):
            raise self._fault(name, value, "a list of pairs of layer numbers")
        return tuple((first, last) for first, last in value)

    def pattern(self, name: str, check: Callable[[str, Any], T]) -> dict[str, T]:
        """The values of an object of patterns, each checked by `check`."""
        value = self._get(name) or {}
        if not isinstance(value, dict):
            raise self._fault(name, value, "an object of patterns")
        return {key: check(f"{name}[{key!r}]", item) for key, item in value.items()}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and [type(item) for item in value] == [int, int]
