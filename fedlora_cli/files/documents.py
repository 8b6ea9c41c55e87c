"""Strict JSON from untrusted files: what Python's parser lets pass is refused here."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from fedlora_cli.errors import InputError

#: Far above any adapter_config.json or sample file; a larger one is an attack or a mistake.
MAX_BYTES = 16 * 1024 * 1024


def read_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in `path`: no duplicate keys, Unicode, at most 16 MiB.

    Numbers that JSON does not have are refused, unless it need not be `finite`: a Trainer whose
    loss diverged writes them. Raises InputError.
    """
    return parse_object(read_bytes(path), where=path, finite=finite)


def read_bytes(path: Path) -> bytes:
    """The content of a regular file of at most 16 MiB. Raises InputError."""
    size = regular_file(path).st_size
    if size > MAX_BYTES:
        raise InputError(path, f"{size} bytes, more than {MAX_BYTES}", "check what this file is")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def parse_object(text: bytes, where: object, *, finite: bool = True) -> dict[str, Any]:
    """`read_object` for bytes in memory; `where` names them in the error."""
    try:
        value = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant if finite else float,
        )
        # Half a surrogate pair can be written in JSON, and nowhere else.
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


def regular_file(path: Path) -> Any:
    """The `os.stat_result` of a regular file. A pipe, which would block, is refused like a folder.

    Raises InputError.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(path, "not a regular file", "replace it by the file itself")
    return status


def exists(path: Path) -> bool:
    """Whether there is something of that name. Raises InputError where that cannot be known."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def unreadable(path: Path, error: OSError) -> InputError:
    """What the system said, as an error about `path`."""
    reason = (error.strerror or str(error)).lower()
    return InputError(path, f"cannot be read ({reason})", "check the path and its permissions")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
