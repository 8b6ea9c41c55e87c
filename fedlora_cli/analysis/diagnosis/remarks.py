"""What a person should know of a series of rounds before trusting its trend."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedlora_cli.analysis.diagnosis.cohort import OUTLIER, robust_z
from fedlora_cli.reports.provenance import Provenance
from fedlora_cli.text import natural


def series_remarks(names: Sequence[str], origins: Sequence[Provenance | None]) -> list[str]:
    """A warning wherever one series seems to be several, has gaps, or is not in order, and where
    one client of the last round outweighs the others.
    """
    return [
        *_order(names),
        *_gaps(names),
        *_repetitions(names),
        *_methods(names, origins),
        *_giants(origins[-1]),
    ]


def _order(names: Sequence[str]) -> list[str]:
    """Where a shell has put round-10 before round-2."""
    alike = len({re.sub(r"\d+", "", name) for name in names}) == 1
    if not alike or list(names) == sorted(names, key=natural):
        return []
    return [f"the rounds are taken in the order given: {', '.join(names)[:200]}"]


def _gaps(names: Sequence[str]) -> list[str]:
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in names]
    found = [part for part in parts if part is not None]
    if len(found) < len(names) or len({(one[1], one[3]) for one in found}) > 1:
        return []
    if all(int(later[2]) - int(earlier[2]) <= 1 for earlier, later in pairwise(found)):
        return []
    return ["there are gaps between these rounds: rates are per adapter given, not per round"]


def _repetitions(names: Sequence[str]) -> list[str]:
    again = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if again is None:
        return []
    return [f"two rounds are named {again}: diagnose two federations one by one"]


def _methods(names: Sequence[str], origins: Sequence[Provenance | None]) -> list[str]:
    return [
        f"from {name} on the method is {later.method}, {earlier.method} before"
        for (earlier, later), name in zip(pairwise(origins), names[1:], strict=True)
        if earlier is not None and later is not None and earlier.method != later.method
    ]


def _giants(last: Provenance | None) -> list[str]:
    """Shares are of all energy: whoever brings most of it decides where it lies."""
    clients = () if last is None else last.clients
    z = robust_z(np.sqrt([sum(client.energy) for client in clients]))
    return [
        f"the update of {client.name} was far larger than the others' in the last round (robust z "
        f"{score:+.1f}): shares of the energy follow it"
        for client, score in zip(clients, z, strict=True)
        if score > OUTLIER
    ]
