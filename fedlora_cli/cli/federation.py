"""The clients of a forecast or a simulation, in the ways in which they can be named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedlora_cli.analysis.prediction.predict import MOST_CLIENTS, ranks_of
from fedlora_cli.cli.shared import heavy_imports, listed, number, numbers, whole_numbers
from fedlora_cli.errors import UsageError
from fedlora_cli.files.locations import optional
from fedlora_cli.remote import Location

_GROUP = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?::([^:]+))?")

_UNIFORM = "no sample counts given, all clients count the same; {} gives them"


@dataclass(frozen=True)
class Federation:
    """Rank and sample count of every client, and what to tell the person about them."""

    ranks: tuple[int, ...]
    samples: tuple[float, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    """So many clients of one rank; `samples` of each, as they were written."""

    size: int
    rank: int
    samples: str | None


def given(
    clients: list[str], ranks: str | None, cohort: str | None, samples: str | None, *, null: bool
) -> Federation:
    """The clients by the one way in which they are named. Raises UsageError and InputError."""
    named = {"CLIENTS": bool(clients), "--ranks": ranks is not None, "--cohort": cohort is not None}
    ways = [way for way, used in named.items() if used]
    if len(ways) != 1:
        found = f"{' and '.join(ways)} together" if ways else "no clients"
        raise UsageError("predict", found, "give one of CLIENTS, --ranks 4,8,16, --cohort 40x4,9x8")
    if cohort is not None:
        if samples is not None:
            raise UsageError("--samples", "given with --cohort", "write counts there, as 40x4:120")
        return _of_groups(cohort)
    if ranks is not None:
        return _of_ranks(ranks, samples)
    return _of_folders(listed(clients, null=null), samples)


def _of_ranks(ranks: str, samples: str | None) -> Federation:
    parsed = whole_numbers("--ranks", ranks)
    if samples is None:
        return Federation(parsed, (1.0,) * len(parsed), (_UNIFORM.format("--samples"),))
    return Federation(parsed, numbers("--samples", samples))


def _of_groups(cohort: str) -> Federation:
    groups = _groups(cohort)
    told = [group.samples is not None for group in groups]
    if any(told) != all(told):
        raise UsageError("--cohort", "counts for some groups only", "give all of them, or none")
    counts = [number("--cohort", group.samples or "1") for group in groups]
    uniform = () if all(told) else (_UNIFORM.format("--cohort 40x4:120"),)
    return Federation(
        _ranks(groups),
        tuple(n for n, group in zip(counts, groups, strict=True) for _ in range(group.size)),
        uniform,
    )


def ranks_in(cohort: str) -> tuple[int, ...]:
    """The ranks of a cohort whose samples come from elsewhere. Raises UsageError.

    >>> ranks_in("3x4,1x16")
    (4, 4, 4, 16)
    """
    groups = _groups(cohort)
    if any(group.samples is not None for group in groups):
        raise UsageError("--cohort", "sample counts, where data are dealt out", "write 8x4,6x8")
    return _ranks(groups)


def _groups(cohort: str) -> list[_Group]:
    """The groups in a list with commas. Raises UsageError."""
    found = []
    for item in cohort.split(","):
        match = _GROUP.fullmatch(item.strip())
        if match is None:
            raise UsageError("--cohort", f"{item!r} is no group", "write 40x4 or 40x4:120")
        found.append(_Group(int(match[1]), int(match[2]), match[3]))
    size = sum(group.size for group in found)
    if size > MOST_CLIENTS:
        raise UsageError("--cohort", f"{size} clients", f"give up to {MOST_CLIENTS}")
    return found


def _ranks(groups: list[_Group]) -> tuple[int, ...]:
    return tuple(group.rank for group in groups for _ in range(group.size))


def _of_folders(paths: list[Location], samples: str | None) -> Federation:
    with heavy_imports():
        from fedlora_cli.clients.reading import read_clients

    found = read_clients(paths, optional(samples))
    ranks, differing = ranks_of(found.cohort)
    return Federation(
        ranks,
        tuple(float(n) for n in found.cohort.samples),
        (*found.remarks, *found.cohort.notes, *differing),
    )
