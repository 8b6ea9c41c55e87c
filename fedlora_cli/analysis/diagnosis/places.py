"""Where the adapters of a diagnosis are: folders, and folders of rounds in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedlora_cli import formats
from fedlora_cli.clients import find_folders

#: The name of the global adapter's folder within the folder of a round.
GLOBAL = "global"


def find_adapters(paths: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """The adapter folders in `paths`, and remarks; within one folder by number, 2 before 10.

    A folder of rounds holds folders that each hold an adapter named `global`. Raises InputError.
    """
    folders: list[Path] = []
    remarks: list[str] = []
    for path in paths:
        rounds = [child / GLOBAL for child in _children(path)]
        found = [one for one in rounds if formats.is_adapter(one)]
        if found and not formats.is_adapter(path):
            folders += sorted(found, key=lambda one: _natural(one.parent.name))
            continue
        listed, left_out = find_folders([path])
        folders += sorted(listed, key=lambda one: _natural(one.name))
        remarks += left_out
    return folders, tuple(remarks)


def _children(path: Path) -> list[Path]:
    try:
        return [child for child in path.iterdir() if not child.name.startswith(".")]
    except OSError:  # whoever reads it next says what is wrong
        return []


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that orders numbers within names as numbers.

    >>> sorted(["round-10", "round-2"], key=_natural)
    ['round-2', 'round-10']
    """
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def round_name(path: Path) -> str:
    """A round's name: that of its adapter's folder, or of the folder around `global`."""
    whole = path.absolute()
    return whole.parent.name if whole.name == GLOBAL else whole.name


def order_remarks(folders: Sequence[Path]) -> tuple[str, ...]:
    """A warning where a shell has put round-10 before round-2."""
    names = [round_name(folder) for folder in folders]
    alike = len({re.sub(r"\d+", "", name) for name in names}) == 1
    if alike and names != sorted(names, key=_natural):
        return (f"the rounds are taken in the order given: {', '.join(names)[:200]}",)
    return ()
