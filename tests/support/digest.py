"""One aggregation, and the digest of all that it writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedlora_cli import AggregateOptions
from support.adapters import Spec

#: Modules that LAPACK would split over threads, of clients of three ranks; robust and clipped, so
#: that every stage of the work takes part.
SPECS = [
    Spec(
        f"client-{k}",
        rank=rank,
        samples=7 + k,
        alpha=rank,
        shapes={f"layers.{i}.fc": (133, 157 + i) for i in range(3)},
    )
    for k, rank in enumerate((30, 12, 30, 5, 12))
]


OPTIONS = AggregateOptions(
    clip_norm="auto", robust="geometric-median", max_weight=0.6, dtype="float64", rank=24
)


def digest(folder: Path) -> str:
    """One SHA-256 over the names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
