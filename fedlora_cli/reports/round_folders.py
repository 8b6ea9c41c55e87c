"""The adapter folders of a diagnosis, and the global adapters in a folder of rounds."""

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

#: The subfolder of a round that holds its global adapter.
GLOBAL = "global"


def find_adapters(paths: Sequence[Location]) -> tuple[list[Location], tuple[str, ...]]:
    """The adapter folders in `paths`, and remarks about folders left out.

    Each path is an adapter folder, a folder of adapter folders, or a folder of rounds, which hold
    an adapter named `global` each. Folders are sorted by number, 2 before 10. Raises InputError.
    """
    folders: list[Location] = []
    remarks: list[str] = []
    for path in paths:
        children = _children(path)
        answers = prefetched(lambda child: formats.is_adapter(child / GLOBAL), children)
        is_round = {child: answer() for child, answer in zip(children, answers, strict=True)}
        rounds = [child for child in is_round if is_round[child]]
        if rounds and not formats.is_adapter(path):
            folders += [child / GLOBAL for child in sorted(rounds, key=_order)]
            series = {series_of(child.name) for child in rounds}
            others = [child for child in children if not is_round[child] and child.is_dir()]
            remarks += [
                f"{child.name} left out: it has no {GLOBAL}"
                for child in sorted(others, key=lambda child: child.parts)
                if series_of(child.name) in series
            ]
            continue
        listed, left_out = find_folders([path], partial(_remark, remarks))
        folders += sorted(listed, key=_order)
        remarks += left_out
    return folders, tuple(remarks)


def _remark(remarks: list[str], fault: InputError) -> None:
    """Add a remark about a folder of clients, which may lie beside global adapters."""
    if not isinstance(fault, Elsewhere):
        raise fault
    remarks.append(f"{fault.where} left out: {fault.found}")


def rounds_in(folder: Location) -> list[Location]:
    """The global adapters in a folder of rounds, sorted by number; empty before the first round.

    They are the subfolders named `global` of its folders, or else those of its folders that fedlora
    aggregated. Clients are never among them. Raises InputError.
    """
    if isinstance(folder, Remote) and not exists(folder):
        return []  # object storage has no empty folders, so the folder is missing before round 1
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "name the folder that holds the rounds")
    children = sorted((child for child in _children(folder) if child.is_dir()), key=_order)
    nested = [child / GLOBAL for child in children if formats.is_adapter(child / GLOBAL)]
    return nested or [child for child in children if read_provenance(child) is not None]


def _children(path: Location) -> list[Location]:
    try:
        return [child for child in path.iterdir() if not child.name.startswith(".")]
    except OSError:  # the next reader of the path reports the fault
        return []


def _order(folder: Location) -> tuple[str | int, ...]:
    return natural(folder.name)


def series_of(name: str) -> str:
    """A name with its numbers replaced by 0, so that the rounds of one series have the same.

    >>> series_of("round-01") == series_of("round-12"), series_of("data") == series_of("round-1")
    (True, False)
    """
    return re.sub(r"[0-9]+", "0", name)


def round_name(path: Location) -> str:
    """The name of a round: of its adapter folder, or of the parent of a folder named `global`."""
    whole = path.absolute()
    return whole.parent.name if whole.name == GLOBAL else whole.name
