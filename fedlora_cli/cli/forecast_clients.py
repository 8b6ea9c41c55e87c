"""The clients of a forecast or a simulation, in each of the ways to give them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedlora_cli.analysis.prediction.options import MOST_CLIENTS
from fedlora_cli.cli.arguments import listed
from fedlora_cli.cli.command import heavy_imports
from fedlora_cli.errors import UsageError
from fedlora_cli.files.locations import optional
from fedlora_cli.options import number, numbers, whole_numbers
from fedlora_cli.remote import Location

_GROUP = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?::([^:]+))?")

_UNIFORM = "no sample counts given: all clients count the same; {} gives counts"


@dataclass(frozen=True)
class ForecastClients:
    """The rank and sample count of each client, and warnings about them."""

    ranks: tuple[int, ...]
    samples: tuple[float, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    """`size` clients of a rank with `samples` each, as text."""

    size: int
    rank: int
    samples: str | None


def forecast_clients(
    clients: list[str], ranks: str | None, cohort: str | None, samples: str | None, *, null: bool
) -> ForecastClients:
    """The clients, given in exactly one way. Raises UsageError and InputError."""
    given = {"CLIENTS": bool(clients), "--ranks": ranks is not None, "--cohort": cohort is not None}
    ways = [way for way, used in given.items() if used]
    if len(ways) != 1:
        found = f"{' and '.join(ways)} together" if ways else "no clients"
        raise UsageError("predict", found, "give one of CLIENTS, --ranks 4,8,16, --cohort 40x4,9x8")
    if cohort is not None:
        if samples is not None:
            raise UsageError("--samples", "given with --cohort", "write counts there, as 40x4:120")
        return _of_groups(_groups(cohort))
    if ranks is not None:
        return _of_ranks(whole_numbers("--ranks", ranks), samples)
    return _of_folders(listed(clients, null=null), samples)


def ranks_in(cohort: str) -> tuple[int, ...]:
    """The ranks of a cohort without sample counts. Raises UsageError.

    >>> ranks_in("3x4,1x16")
    (4, 4, 4, 16)
    """
    groups = _groups(cohort)
    if any(group.samples is not None for group in groups):
        cure = "write 8x4,6x8: the data set decides the counts"
        raise UsageError("--cohort", "sample counts in a simulation", cure)
    return _ranks(groups)


def _of_ranks(ranks: tuple[int, ...], samples: str | None) -> ForecastClients:
    if samples is None:
        return ForecastClients(ranks, (1.0,) * len(ranks), (_UNIFORM.format("--samples"),))
    return ForecastClients(ranks, numbers("--samples", samples))


def _of_groups(groups: list[_Group]) -> ForecastClients:
    counted = [group.samples is not None for group in groups]
    if any(counted) != all(counted):
        raise UsageError("--cohort", "counts for some groups only", "give all of them, or none")
    counts = [number("--cohort", group.samples or "1") for group in groups]
    return ForecastClients(
        _ranks(groups),
        tuple(n for n, group in zip(counts, groups, strict=True) for _ in range(group.size)),
        () if all(counted) else (_UNIFORM.format("--cohort 40x4:120"),),
    )


def _of_folders(paths: list[Location], samples: str | None) -> ForecastClients:
    with heavy_imports():
        from fedlora_cli.analysis.prediction.predict import ranks_of
        from fedlora_cli.clients.reading import read_clients

    loaded = read_clients(paths, optional(samples))
    ranks, differing = ranks_of(loaded.cohort)
    return ForecastClients(
        ranks,
        tuple(map(float, loaded.cohort.samples)),
        (*loaded.remarks, *loaded.cohort.notes, *differing),
    )


def _groups(cohort: str) -> list[_Group]:
    """The groups in a list with commas. Raises UsageError."""
    groups = []
    for item in cohort.split(","):
        match = _GROUP.fullmatch(item.strip())
        if match is None:
            raise UsageError("--cohort", f"{item!r} is no group", "write 40x4 or 40x4:120")
        groups.append(_Group(int(match[1]), int(match[2]), match[3]))
    size = sum(group.size for group in groups)
    if size > MOST_CLIENTS:
        raise UsageError("--cohort", f"{size} clients", f"give up to {MOST_CLIENTS}")
    return groups


def _ranks(groups: list[_Group]) -> tuple[int, ...]:
    return tuple(group.rank for group in groups for _ in range(group.size))
