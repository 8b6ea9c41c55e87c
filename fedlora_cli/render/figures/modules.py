"""The map of energy by module and rank index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, takewhile

import numpy as np
from matplotlib.axes import Axes

from fedlora_cli.render.figures.canvas import literal
from fedlora_cli.render.figures.heat import boundary, energy_map
from fedlora_cli.render.figures.panels import heading, nothing, whole_ticks
from fedlora_cli.render.figures.values import Floats, shares
from fedlora_cli.reports.diagnose import ModuleSpectrum
from fedlora_cli.text import natural

#: The most labels that fit beside a map.
MOST = 44


def module_map(
    axes: Axes,
    modules: Sequence[ModuleSpectrum],
    shared_rank: int | None,
    dead: float,
    where: str = "",
) -> None:
    """The share of each module's energy by rank index, modules in the order of the model."""
    title = f"Where each module's energy lies{where}"
    modules = sorted(modules, key=lambda module: natural(module.name))
    width = max((len(module.singular_values) for module in modules), default=0)
    if not width:
        nothing(axes, title, "No module has a singular value.")
        return
    values = _shares(modules, width)
    dashed = 0 < (shared_rank or 0) < width
    notes = ["dashed: the end of the shared rank"] if dashed else []
    if np.isnan(values).any():
        notes.append("hatched: no such direction, or no energy")
    heading(axes, title, "; ".join(notes))
    energy_map(axes, values, dead, "share of the module's energy")
    boundary(axes.axvline, shared_rank, width)
    whole_ticks(axes.xaxis)
    axes.set_xlabel("rank index")
    parents, positions, labels = module_labels([module.name for module in modules], MOST)
    axes.set_yticks([position + 1 for position in positions], labels, fontsize=7)
    axes.set_ylabel(f"module (in {literal(parents, 30)})" if parents else "module")


def module_labels(names: Sequence[str], most: int) -> tuple[str, list[float], list[str]]:
    """The common parents of all names, and at most `most` labels with their positions from 0: one
    per module, else one per layer in the middle of its modules, else one per n-th layer.

    >>> module_labels(["m.h.0.a", "m.h.0.b", "m.h.1.a", "m.h.1.b"], 4)
    ('m', [0.0, 1.0, 2.0, 3.0], ['h.0.a', 'h.0.b', 'h.1.a', 'h.1.b'])
    >>> module_labels(["m.h.0.a", "m.h.0.b", "m.h.1.a", "m.h.1.b"], 2)
    ('m', [0.5, 2.5], ['h.0', 'h.1'])
    """
    parts = [name.split(".") for name in names]
    alike = takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))
    shared = max(0, len(list(alike)) - 1)
    short = [".".join(part[shared:]) for part in parts]
    groups = [list(rows) for _, rows in groupby(enumerate(short), key=lambda row: _layer(row[1]))]
    if len(names) <= most:
        groups = [[row] for row in enumerate(short)]
    step = -(-len(groups) // most)
    chosen = groups[::step]
    positions = [(rows[0][0] + rows[-1][0]) / 2 for rows in chosen]
    labels = [rows[0][1] if len(names) <= most else _layer(rows[0][1]) for rows in chosen]
    return ".".join(parts[0][:shared]), positions, [literal(label, 34) for label in labels]


def _layer(name: str) -> str:
    """The name up to its last number."""
    layer = re.match(r".*\.[0-9]+(?=\.|$)|[0-9]+(?=\.|$)", name)
    return layer[0] if layer else name


def _shares(modules: Sequence[ModuleSpectrum], width: int) -> Floats:
    values = np.full((len(modules), width), np.nan)
    for row, module in enumerate(modules):
        s = np.asarray(module.singular_values, dtype=np.float64)
        # Relative to the largest value, because the square of a tiny value may underflow.
        values[row, : s.size] = shares(np.square(s / s[0])) if s.any() else np.nan
    return values
