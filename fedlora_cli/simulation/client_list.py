"""A file that lists the clients with their rows of the training split, and perhaps their ranks.

    {"ann": [0, 1, 4], "bob": [2, 3]}
    {"ann": {"rank": 8, "rows": [0, 1, 4]}, "bob": {"rank": 4, "rows": [2, 3]}}

or CSV lines `row,client`. Rows are counted from 0.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora_cli.clients.names import folded
from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import parse_object, read_bytes
from fedlora_cli.files.locations import location
from fedlora_cli.text import natural, shortened

#: Characters that the name of a folder cannot have on every system.
_SPECIAL = re.compile(r'[/\\:*?"<>|]')

#: Bytes of a folder's name that leave room for temporary endings within the usual 255.
_LONGEST = 200

_ROW = re.compile(r"[0-9]{1,18}")

_FORM = 'write {"ann": [0, 1]} or {"ann": {"rank": 8, "rows": [0, 1]}}'


@dataclass(frozen=True)
class ClientList:
    """The rows of each client, and its rank if the file has ranks; both in the order of names."""

    file: str
    rows: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]

    def by_row(self, size: int) -> tuple[str, ...]:
        """The client of each of `size` rows, "" for a row of no client. Raises InputError."""
        result = [""] * size
        for name, rows in self.rows.items():
            for row in rows:
                if row >= size:
                    found = f"row {row} of {name}, but the training split has {size} rows"
                    raise InputError(self.file, found, "count the rows from 0")
                if result[row]:
                    found = f"row {row} is listed for {result[row]}, and again for {name}"
                    raise InputError(self.file, found, "list each row once")
                result[row] = name
        return tuple(result)


def in_order(names: Iterable[str]) -> list[str]:
    """Different names in the order of clients: client 2 before client 10.

    >>> in_order(["site-10", "site-2", "site-10"])
    ['site-2', 'site-10']
    """
    return sorted(set(names), key=lambda name: (natural(name), name))


def check_names(names: Iterable[str], where: object) -> None:
    """Raises InputError for names that folders cannot have, or that some systems take for one."""
    first: dict[str, str] = {}
    for name in names:
        fits = name.isprintable() and not _SPECIAL.search(name) and name == name.strip(" ")
        if not fits or name.startswith(".") or not 0 < len(name.encode()) <= _LONGEST:
            found = f"the client {name[:60]!r} cannot be the name of a folder"
            raise InputError(where, found, "use letters, digits, spaces, - and _ in its name")
        other = first.setdefault(folded(name), name)
        if other != name:
            found = f"the clients {other} and {name} differ only in case or spelling of letters"
            raise InputError(where, found, "give clients names that differ in more")


def read_client_list(file: str) -> ClientList:
    """The clients in a JSON or CSV file. Raises InputError and UsageError."""
    path = location(file)
    text = read_bytes(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] == b"{"
    rows, ranks = _of_json(parse_object(text, path), file) if is_json else _of_csv(text, file)
    if len(rows) < 2:
        found = "a single client" if rows else "no clients"
        raise InputError(file, found, "list two clients or more")
    without = [name for name in rows if name not in ranks]
    if ranks and without:
        found = f"no rank for {shortened(without)}, but for other clients"
        raise InputError(file, found, "give every client a rank, or none")
    check_names(rows, file)
    names = in_order(rows)
    return ClientList(
        file,
        {name: tuple(rows[name]) for name in names},
        {name: ranks[name] for name in names if ranks},
    )


def _of_json(document: Mapping[str, Any], file: str) -> tuple[dict[str, list[int]], dict[str, int]]:
    every: dict[str, list[int]] = {}
    ranks: dict[str, int] = {}
    for name, value in document.items():
        rows = value.get("rows") if isinstance(value, dict) else value
        unknown = set(value) - {"rank", "rows"} if isinstance(value, dict) else ()
        if unknown or not isinstance(rows, list):
            found = f"the client {name[:60]} has {', '.join(sorted(unknown)) or 'no list of rows'}"
            raise InputError(file, found[:200], _FORM)
        wrong = [row for row in rows if type(row) is not int or row < 0]
        if wrong or not rows:
            found = f"row {repr(wrong[0])[:40]} of {name}" if wrong else f"no rows for {name}"
            raise InputError(file, found, "list whole numbers from 0 on")
        every[name] = rows
        if isinstance(value, dict) and "rank" in value:
            ranks[name] = rank = value["rank"]
            if type(rank) is not int or rank < 1:
                found = f"rank {repr(rank)[:40]} of {name}"
                raise InputError(file, found, "give a whole number of 1 or more")
    return every, ranks


def _of_csv(text: bytes, file: str) -> tuple[dict[str, list[int]], dict[str, int]]:
    """The rows in lines `row,client`; a first line with these words is a header."""
    try:
        lines = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(file, f"not CSV ({error})", "write lines `row,client`") from None
    every: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line]
        if not any(cells) or (number == 1 and cells == ["row", "client"]):
            continue
        if len(cells) != 2 or not _ROW.fullmatch(cells[0]) or not cells[1]:
            found = f"line {number} is {','.join(cells)[:60]!r}"
            raise InputError(file, found, "write lines `row,client`, with rows counted from 0")
        every.setdefault(cells[1], []).append(int(cells[0]))
    return every, {}
