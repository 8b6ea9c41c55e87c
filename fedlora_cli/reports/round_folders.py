"""Where the adapters of a diagnosis are: folders, and folders of rounds in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from fedlora_cli import formats
from fedlora_cli.clients.discovery import Elsewhere, find_folders
from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import exists
from fedlora_cli.remote import Location, Remote, prefetched
from fedlora_cli.reports.provenance import read_provenance
from fedlora_cli.text import natural

#: The name of the global adapter's folder within the folder of a round.
GLOBAL = "global"


def find_adapters(paths: Sequence[Location]) -> tuple[list[Location], tuple[str, ...]]:
    """The adapter folders in `paths`, and remarks; within one folder by number, 2 before 10.

    A folder of rounds holds folders that each hold an adapter named `global`. Raises InputError.
    """
    folders: list[Location] = []
    remarks: list[str] = []
    for path in paths:
        children = _children(path)
        held = prefetched(lambda child: formats.is_adapter(child / GLOBAL), children)
        rounds = {child: answer() for child, answer in zip(children, held, strict=True)}
        if any(rounds.values()) and not formats.is_adapter(path):
            folders += [one / GLOBAL for one in sorted(rounds, key=_order) if rounds[one]]
            alike = {series_of(one.name) for one in rounds if rounds[one]}
            without = sorted(
                (one for one in rounds if not rounds[one] and one.is_dir()),
                key=lambda one: one.parts,
            )
            remarks += [
                f"{one.name} left out: no {GLOBAL} in it"
                for one in without
                if series_of(one.name) in alike
            ]
            continue
        listed, left_out = find_folders([path], partial(_remark, remarks))
        folders += sorted(listed, key=_order)
        remarks += left_out
    return folders, tuple(remarks)


def _remark(remarks: list[str], fault: InputError) -> None:
    """Of what may well stand beside global adapters: folders of clients."""
    if not isinstance(fault, Elsewhere):
        raise fault
    remarks.append(f"{fault.where} left out: {fault.found}")


def rounds_in(folder: Location) -> list[Location]:
    """The global adapters in a folder of rounds, in the order of their numbers; maybe none.

    They are what is named `global` in its folders, or else those of its folders that fedlora
    aggregated: never a client. Raises InputError.
    """
    if isinstance(folder, Remote) and not exists(folder):
        return []  # a store has no empty folders, as there is before the first round
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "name the folder that holds the rounds")
    children = sorted((child for child in _children(folder) if child.is_dir()), key=_order)
    nested = [child / GLOBAL for child in children if formats.is_adapter(child / GLOBAL)]
    return nested or [child for child in children if read_provenance(child) is not None]


def _children(path: Location) -> list[Location]:
    try:
        return [child for child in path.iterdir() if not child.name.startswith(".")]
    except OSError:  # whoever reads it next says what is wrong
        return []


def _order(folder: Location) -> tuple[str | int, ...]:
    return natural(folder.name)


def series_of(name: str) -> str:
    """A name with no number in it: rounds of one series have the same.

    >>> series_of("round-01") == series_of("round-12"), series_of("data") == series_of("round-1")
    (True, False)
    """
    return re.sub(r"[0-9]+", "0", name)


def round_name(path: Location) -> str:
    """A round's name: that of its adapter's folder, or of the folder around `global`."""
    whole = path.absolute()
    return whole.parent.name if whole.name == GLOBAL else whole.name
