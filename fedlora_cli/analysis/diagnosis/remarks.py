"""Warnings about a series of rounds whose trend may mislead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from fedlora_cli.analysis.diagnosis.cohort import OUTLIER, robust_z
from fedlora_cli.reports.provenance import Provenance
from fedlora_cli.text import natural


def series_remarks(names: Sequence[str], origins: Sequence[Provenance | None]) -> list[str]:
    """Warnings about rounds out of order, gaps, repeated names, changes of the method, and clients
    of the last round with far larger updates than the others.
    """
    return [
        *_order(names),
        *_gaps(names),
        *_repetitions(names),
        *_methods(names, origins),
        *_giants(origins[-1]),
    ]


def _order(names: Sequence[str]) -> Iterator[str]:
    """A warning about an order by text, such as round-10 before round-2."""
    alike = len({re.sub(r"\d+", "", name) for name in names}) == 1
    if alike and list(names) != sorted(names, key=natural):
        yield f"the rounds keep the given order: {', '.join(names)[:200]}"


def _gaps(names: Sequence[str]) -> Iterator[str]:
    parts = [part for name in names if (part := re.fullmatch(r"(.*?)(\d+)(\D*)", name))]
    alike = len(parts) == len(names) and len({(part[1], part[3]) for part in parts}) == 1
    if alike and any(int(later[2]) - int(earlier[2]) > 1 for earlier, later in pairwise(parts)):
        yield "rounds are missing: rates are per given adapter, not per round"


def _repetitions(names: Sequence[str]) -> Iterator[str]:
    again = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if again is not None:
        yield f"two rounds are named {again}: diagnose each federation separately"


def _methods(names: Sequence[str], origins: Sequence[Provenance | None]) -> list[str]:
    return [
        f"the method changes in {name} from {earlier.method} to {later.method}"
        for (earlier, later), name in zip(pairwise(origins), names[1:], strict=True)
        if earlier is not None and later is not None and earlier.method != later.method
    ]


def _giants(last: Provenance | None) -> list[str]:
    """Warnings about outliers: the largest updates dominate the shares of the energy."""
    clients = () if last is None else last.clients
    z = robust_z(np.sqrt([sum(client.energy) for client in clients]))
    return [
        f"the update of {client.name} in the last round is far larger than the others' (robust z "
        f"{score:+.1f}): it dominates the shares of the energy"
        for client, score in zip(clients, z, strict=True)
        if score > OUTLIER
    ]
