"""The clients that a forecast is for, in the one of three ways in which they can be named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedlora_cli.analysis.prediction.predict import MOST_CLIENTS, ranks_of
from fedlora_cli.cli.shared import heavy_imports, listed
from fedlora_cli.errors import UsageError

_GROUP = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?::([^:]+))?")

_UNIFORM = "no sample counts given, all clients count the same; {} gives them"


@dataclass(frozen=True)
class Federation:
    """Rank and sample count of every client, and what to tell the person about them."""

    ranks: tuple[int, ...]
    samples: tuple[float, ...]
    warnings: tuple[str, ...] = ()


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
    parsed = tuple(int(_number("--ranks", item, whole=True)) for item in ranks.split(","))
    if samples is None:
        return Federation(parsed, (1.0,) * len(parsed), (_UNIFORM.format("--samples"),))
    counts = tuple(_number("--samples", item, whole=False) for item in samples.split(","))
    return Federation(parsed, counts)


def _of_groups(cohort: str) -> Federation:
    groups = [_GROUP.fullmatch(item.strip()) for item in cohort.split(",")]
    found = [group.groups() for group in groups if group is not None]
    if len(found) != len(groups):
        wrong = cohort.split(",")[groups.index(None)]
        raise UsageError("--cohort", f"{wrong!r} is no group", "write 40x4 or 40x4:120")
    told = [samples is not None for _, _, samples in found]
    if any(told) != all(told):
        raise UsageError("--cohort", "counts for some groups only", "give all of them, or none")
    sizes = [int(size) for size, _, _ in found]
    if sum(sizes) > MOST_CLIENTS:
        raise UsageError("--cohort", f"{sum(sizes)} clients", f"give up to {MOST_CLIENTS}")
    counts = [_number("--cohort", samples or "1", whole=False) for _, _, samples in found]
    uniform = () if all(told) else (_UNIFORM.format("--cohort 40x4:120"),)
    return Federation(
        tuple(
            int(rank) for (_, rank, _), size in zip(found, sizes, strict=True) for _ in range(size)
        ),
        tuple(n for n, size in zip(counts, sizes, strict=True) for _ in range(size)),
        uniform,
    )


def _of_folders(paths: list[Path], samples: str | None) -> Federation:
    with heavy_imports():
        from fedlora_cli.clients import read_clients

    found = read_clients(paths, None if samples is None else Path(samples))
    ranks, differing = ranks_of(found.cohort)
    return Federation(
        ranks,
        tuple(float(n) for n in found.cohort.samples),
        (*found.remarks, *found.cohort.notes, *differing),
    )


def _number(flag: str, text: str, *, whole: bool) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        found = f"{text[:40]!r} is no number"
        raise UsageError(flag, found, f"give {kind} with commas between them") from None
