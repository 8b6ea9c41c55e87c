"""Options as fields of a dataclass: the flags, the help and the check of each stand in one place.

The command line and the documents are made from these fields; `check_options` checks their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from fedlora_cli.errors import UsageError, require
from fedlora_cli.remote import Location

Value = TypeVar("Value")


class Check(NamedTuple):
    """A condition on a value, and its range in words."""

    holds: Callable[[Any], bool]
    range: str


#: Ranges that several options have.
SHARE = Check(lambda value: 0 <= value <= 1, "in [0, 1]")
POSITIVE_SHARE = Check(lambda value: 0 < value <= 1, "in (0, 1]")
BELOW_ONE = Check(lambda value: 0 <= value < 1, "in [0, 1)")


def at_least(least: int, remark: str = "") -> Check:
    return Check(lambda value: value >= least, f"{least} or more{remark}")


@dataclass(frozen=True)
class Option:
    """A field on the command line.

    - `flags`: the first is the name in messages. `panel`: of the help. `words`: for completion.
    - `note`: the end of the help, made when the command is.
    - `parse`: the value from the flag and `text`, the type on the command line where that is not
      the field's. Raises UsageError.
    - `check`: of a value, or of each element of a tuple. Values of a Literal need none.
    """

    help: str
    flags: tuple[str, ...]
    panel: str | None = None
    metavar: str | None = None
    show_default: bool = False
    words: Callable[[], Sequence[str]] | None = None
    note: Callable[[], str] | None = None
    text: Any = None
    parse: Callable[[str, Any], Any] | None = None
    check: Check | None = None


class Spec(NamedTuple):
    """An option with the name, type and default of its field."""

    name: str
    type: Any
    default: Any
    option: Option


def option(default: Value, help: str, *flags: str, **more: Any) -> Value:
    """A field with an option. Its flag is the name of the field unless `flags` has a long one.

    `more` are the other fields of `Option`.
    """
    return field(default=default, metadata={"option": Option(help, flags, **more)})


def samples_option() -> Location | None:
    return option(
        None,
        "Sample counts: a JSON object or CSV `client,samples`; default: from the client folders.",
        metavar="FILE",
    )


def adapter_option() -> str | None:
    return option(
        None,
        "Subfolder of each client folder that holds the adapter; 'checkpoint-*' takes the last "
        "checkpoint.",
        metavar="NAME",
    )


def base_option(panel: str | None = None) -> str | None:
    return option(None, "Base model, in place of the name in the adapters.", panel=panel)


def jobs_option(of: str = "Modules", panel: str | None = None) -> int:
    check = at_least(0, "; 0 is all cores")
    return option(
        0, f"{of} processed at a time; default: all cores.", "-j", panel=panel, check=check
    )


@functools.cache
def options_of(kind: Any) -> tuple[Spec, ...]:
    """The options of a dataclass, in order."""
    types = get_type_hints(kind)
    return tuple(
        Spec(
            each.name, types[each.name], each.default, _flagged(each.name, each.metadata["option"])
        )
        for each in fields(kind)
        if "option" in each.metadata
    )


def _flagged(name: str, option: Option) -> Option:
    if any(flag.startswith("--") for flag in option.flags):
        return option
    return replace(option, flags=(f"--{name.replace('_', '-')}", *option.flags))


def check_options(options: Any) -> None:
    """Check the words and ranges of a dataclass of options. Raises UsageError."""
    kind: Any = type(options)
    for name, annotation, default, option in options_of(kind):
        value, words = getattr(options, name), words_of(annotation)
        flag = option.flags[0].partition("/")[0]
        if value is None and default is None:
            continue
        if option.check is not None:
            for item in value if isinstance(value, tuple) else (value,):
                require(option.check.holds(item), flag, item, option.check.range)
        elif words:
            require(value in words, flag, repr(value), f"one of {', '.join(words)}")


def words_of(kind: Any) -> tuple[str, ...]:
    """The words of a Literal, or of one in a union.

    >>> words_of(Literal["left", "right"] | None)
    ('left', 'right')
    """
    kinds = (kind, *get_args(kind))
    return tuple(word for each in kinds if get_origin(each) is Literal for word in get_args(each))


def number(flag: str, text: str) -> float:
    """Raises UsageError."""
    return _number(float, flag, text, "give numbers with commas between them")


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """The numbers in a list with commas. Raises UsageError.

    >>> numbers("--lr", "1e-3,0.5")
    (0.001, 0.5)
    """
    return tuple(number(flag, item) for item in text.split(","))


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """The whole numbers in a list with commas. Raises UsageError.

    >>> whole_numbers("--ranks", "4,8,16")
    (4, 8, 16)
    """
    cure = "give whole numbers with commas between them"
    return tuple(_number(int, flag, item, cure) for item in text.split(","))


def names(flag: str, text: str) -> tuple[str, ...]:
    """The names in a list with commas. Raises UsageError.

    >>> names("--modules-to-save", "score, classifier")
    ('score', 'classifier')
    """
    items = tuple(name.strip() for name in text.split(","))
    if not all(items):
        raise UsageError(flag, f"{text[:40]!r} has an empty name", "give names with commas")
    return items


def _number(kind: Callable[[str], Value], flag: str, text: str, cure: str) -> Value:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(flag, f"{text[:40]!r} is no number", cure) from None
