"""Strict JSON from untrusted files: what Python's parser lets pass is refused here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.untrusted import opened, unreadable
from fedlora_cli.remote import Location, Remote, StorageError

#: Far above any file of sample counts; a larger one is an attack or a mistake.
MAX_BYTES = 16 * 1024 * 1024

#: Objects and lists in one document, which take up to 200 bytes each where their text has two. The
#: report about 50 000 modules of 100 000 clients has 400 000.
MAX_CONTAINERS = 1_000_000

#: Values in one document, which take up to 36 bytes each where their text has four. That report has
#: one for every singular value, and one for every client in every module.
MAX_VALUES = 10_000_000

#: Half of a surrogate pair can be written in JSON, and nowhere else.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class TooLarge(InputError):
    """A document with more bytes than what it is read for can have."""


def read_object(path: Location, *, finite: bool = True, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in `path`: no duplicate keys, Unicode, at most that many bytes.

    Numbers that JSON does not have are refused, unless it need not be `finite`: a Trainer whose
    loss diverged writes them. Raises InputError.
    """
    return parse_object(read_bytes(path, most=most), where=path, finite=finite)


def read_bytes(path: Location, *, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most that many bytes. Raises InputError."""
    with opened(path) as file:
        if file.state.size > most:
            found = f"{file.state.size} bytes, more than {most}"
            raise TooLarge(path, found, "check what this file is")
        return file.read(0, file.state.size)


def read_beginning(path: Location, length: int) -> bytes:
    """The first bytes of a regular file, at most so many. Raises InputError."""
    with opened(path) as file:
        return file.read(0, min(length, file.state.size))


def parse_object(
    text: bytes, where: object, *, finite: bool = True, whole: Callable[[str], Any] = int
) -> dict[str, Any]:
    """`read_object` for bytes in memory; `where` names them in the error, `whole` makes a value of
    the digits of every whole number.
    """
    if text.count(b"[") + text.count(b"{") > MAX_CONTAINERS or text.count(b",") > MAX_VALUES:
        found = f"more than {MAX_CONTAINERS} objects and lists, or {MAX_VALUES} values"
        raise InputError(where, found, "check what this file is")
    try:
        value = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_int=whole,
            parse_constant=_no_constant if finite else float,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise InputError(where, "not Unicode text", "write the file again as UTF-8") from None
    except RecursionError:
        raise InputError(where, "JSON nested too deeply", "write the file again") from None
    except ValueError as error:  # JSONDecodeError is one
        raise InputError(where, f"not valid JSON ({error})", "write the file again") from None
    if not isinstance(value, dict):
        raise InputError(where, f"a JSON {type(value).__name__}", "it must hold one JSON object")
    return value


def exists(path: Location) -> bool:
    """Whether there is something of that name. Raises InputError where that cannot be known."""
    try:
        if isinstance(path, Remote):
            return path.exists()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def unwritable(path: Location, error: OSError) -> OutputError:
    """What the system said, or a store, as an error about what was to be written."""
    if isinstance(error, StorageError):
        return OutputError(path, f"cannot be written ({error})", error.cure)
    reason = (error.strerror or str(error)).lower()
    return OutputError(path, f"cannot be written ({reason})", "check space and permissions")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
