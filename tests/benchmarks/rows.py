"""The lines of the table: what was measured, against what, and the bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

Unit = Literal["s", "B", "×"]


@dataclass(frozen=True)
class Row:
    """`ours` and `theirs` in one unit. The ratio is theirs / ours, how many times less we take;
    with `at_most`, and where nothing of the kind is claimed (`cost`), it is ours / theirs.
    """

    figure: str
    work: str
    what: str
    ours: float
    against: str
    theirs: float
    unit: Unit = "s"
    cost: bool = False
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float:
        if self.cost or self.at_most is not None:
            return self.ours / self.theirs
        return self.theirs / self.ours

    @property
    def bar(self) -> str:
        """What the ratio should be, in a word."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"

    @property
    def reached(self) -> bool | None:
        """Whether it is; None without a bar."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return None if self.at_most is None else self.ratio <= self.at_most


@dataclass(frozen=True)
class Curve:
    """How the time grows by clients, rank or width: times the first, beside the arithmetic."""

    sweep: str
    values: tuple[int, ...]
    time: tuple[float, ...]
    arithmetic: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """All that one run found out."""

    size: str
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = ()


def number(value: float) -> str:
    """Two digits, or all of a larger number before the point.

    >>> number(0.0372), number(1.26), number(126.3)
    ('0.037', '1.3', '126')
    """
    return f"{value:.0f}" if value >= 100 else f"{float(f'{value:.2g}'):g}"


def shown(value: float, unit: Unit) -> str:
    """A value with its unit.

    >>> shown(0.0372, "s"), shown(7325.0, "s"), shown(2.1e9, "B"), shown(3.9, "×")
    ('37 ms', '2 h', '2.1 GB', '× 3.9')
    """
    if unit == "×":
        return f"× {number(value)}"
    steps = {
        "s": ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")),
        "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    }[unit]
    size, name = next((step for step in steps if value >= step[0]), steps[-1])
    return f"{number(value / size)} {name}"


HEADS = ("", "fedlora", "against", "takes", "ratio", "bar", "reached")


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table, under `HEADS`."""
    reached = {True: "yes", False: "no", None: ""}[row.reached]
    ours, theirs = shown(row.ours, row.unit), shown(row.theirs, row.unit)
    return row.what, ours, row.against, theirs, number(row.ratio), row.bar, reached


def by_work(results: Results) -> dict[str, list[Row]]:
    """The rows under what they are about, in the order in which these occur first."""
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(row.work, []).append(row)
    return groups


def table(results: Results) -> Table:
    """For a terminal."""
    made = Table(*HEADS, title=title(results), title_justify="left")
    colours = {True: "green", False: "red", None: None}
    for work, rows in by_work(results).items():
        made.add_section()
        made.add_row(f"[bold]{work}")
        for row in rows:
            made.add_row(*cells(row), style=colours[row.reached])
    return made


def markdown(results: Results) -> str:
    """The table for `README.md` of this folder."""
    lines = [f"{title(results)}:\n", "\n", "| " + " | ".join(HEADS) + " |\n"]
    lines.append("|" + "---|" * len(HEADS) + "\n")
    for work, rows in by_work(results).items():
        lines.append(f"| **{work}** |" + " |" * (len(HEADS) - 1) + "\n")
        lines += ["| " + " | ".join(cells(row)) + " |\n" for row in rows]
    return "".join(lines)


def title(results: Results) -> str:
    """What it was measured on."""
    one = results.machine
    memory = f"{one['memory'] / 2**30:.0f} GB"
    return f"{one['processor']}, {one['cores']} cores, {memory}, torch {one['torch']}"


def to_json(results: Results) -> str:
    """The document, ratios included."""
    document = asdict(results)
    for entry, row in zip(document["rows"], results.rows, strict=True):
        entry |= {"ratio": row.ratio, "reached": row.reached}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Results:
    """What `to_json` wrote."""
    document = json.loads(text)
    rows: Sequence[dict[str, Any]] = document["rows"]
    made = (
        Row(**{key: row[key] for key in row if key not in {"ratio", "reached"}}) for row in rows
    )
    curves = (
        Curve(one["sweep"], *(tuple(one[key]) for key in ("values", "time", "arithmetic")))
        for one in document["curves"]
    )
    return Results(document["size"], document["machine"], tuple(made), tuple(curves))


def load(place: Path) -> Results:
    return from_json(place.read_text(encoding="utf-8"))
