"""The table of attacks, from `samples/attacks.json`, which `test_attacks.py` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

PLACE = Path(__file__).parents[2] / "samples" / "attacks.json"

#: Not an attack: by how much anybody moves the result.
MORE = "two more honest clients"


def number(value: float) -> str:
    """Two significant digits, without a power of ten.

    >>> number(166.3), number(0.0471), number(0.0)
    ('170', '0.047', '0')
    """
    return f"{float(f'{value:.2g}'):g}"


def row(words: str, cells: Mapping[str, Mapping[str, float]], *, of_honest: bool) -> str:
    """One line; in bold what is worse than without a defence."""
    worst = {defence: cell["worst"] for defence, cell in cells.items()}
    shown = [
        f"**{number(one)}**"
        if not of_honest and float(number(one)) > float(number(worst["none"]))
        else number(one)
        for one in worst.values()
    ]
    return "| " + " | ".join([words, *shown]) + " |\n"


def attacks_table() -> str:
    found = json.loads(PLACE.read_text())
    heads = ["", *found["cost"]]
    lines = ["| " + " | ".join(heads) + " |\n", "|" + "---|" * len(heads) + "\n"]
    lines.append(row("*no attack*", found["cost"], of_honest=True))
    for attack, cells in found["movement"].items():
        honest = attack == MORE
        lines.append(row(f"*{attack}*" if honest else attack, cells, of_honest=honest))
    return "".join(lines)


TABLES = {"attacks": attacks_table}
