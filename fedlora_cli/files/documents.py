"""Strict JSON from untrusted files, with limits on size, nesting and number of values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.untrusted import opened, unreadable
from fedlora_cli.remote import Location, Remote, StorageError

#: Limit in bytes, far above any file of sample counts.
MAX_BYTES = 16 * 1024 * 1024

#: Limit for objects and lists in a document: each takes up to 200 bytes of memory and two of text.
#: The report on 50 000 modules of 100 000 clients has 400 000.
MAX_CONTAINERS = 1_000_000

#: Limit for values in a document: each takes up to 36 bytes of memory and four of text. A report
#: has a value for each singular value and for each client of each module.
MAX_VALUES = 10_000_000

#: JSON can hold half of a surrogate pair, which is not Unicode text.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class TooLarge(InputError):
    """A document has more bytes than its purpose allows."""


def read_object(path: Location, *, finite: bool = True, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes, with unique keys and Unicode text.

    NaN and infinities are refused unless `finite` is false: a Trainer writes them when its loss
    diverges. Raises InputError.
    """
    return parse_object(read_bytes(path, most=most), where=path, finite=finite)


def read_bytes(path: Location, *, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises InputError."""
    with opened(path) as file:
        if file.state.size > most:
            found = f"{file.state.size} bytes, more than {most}"
            raise TooLarge(path, found, "check what this file is")
        return file.read(0, file.state.size)


def read_beginning(path: Location, length: int) -> bytes:
    """The first `length` bytes of a regular file, or all if it is shorter. Raises InputError."""
    with opened(path) as file:
        return file.read(0, min(length, file.state.size))


def parse_object(
    text: bytes, where: object, *, finite: bool = True, whole: Callable[[str], Any] = int
) -> dict[str, Any]:
    """`read_object` for bytes in memory. `where` names them in errors; `whole` converts the digits
    of each integer.
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
    except ValueError as error:  # includes JSONDecodeError
        raise InputError(where, f"not valid JSON ({error})", "write the file again") from None
    if not isinstance(value, dict):
        raise InputError(where, f"a JSON {type(value).__name__}", "it must hold one JSON object")
    return value


def exists(path: Location) -> bool:
    """Whether a file or folder exists. Raises InputError if the system does not tell."""
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
    """The OutputError for an OSError or a StorageError at `path`."""
    if isinstance(error, StorageError):
        return OutputError(path, f"cannot be written ({error})", error.cure)
    reason = (error.strerror or str(error)).lower()
    return OutputError(path, f"cannot be written ({reason})", "check space and permissions")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
