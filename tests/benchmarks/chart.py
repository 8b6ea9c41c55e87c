"""The table as a picture: how long each takes, and how the time grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Curve, Results, Row, number, shown, title

_OURS, _THEIRS, _FLOOR = "#0b6e4f", "#b8b8b8", "#e0a030"

#: Inches: of a panel's height what one bar takes, and what its title and axis take.
_BAR, _FRAME, _WIDTH = 0.32, 1.0, 9.0


def draw(results: Results, place: Path) -> None:
    """Write the SVG; equal results give equal bytes."""
    groups = _groups(results.rows)
    heights = [_FRAME + _BAR * (len(rows) + 1) for rows in groups.values()]
    if results.curves:
        heights.append(3.2)
    if not heights:
        return
    with rc_context({"svg.hashsalt": "fedlora", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(_WIDTH, sum(heights) + _BAR), layout="constrained")
        figure.suptitle(f"{title(results)}; bars are logarithmic", fontsize=9, color="#555555")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (name, rows) in zip(parts, groups.items(), strict=False):
            _bars(part.subplots(), name, rows)
        if results.curves:
            panels = parts[-1].subplots(1, len(results.curves), squeeze=False)[0]
            for axes, curve in zip(panels, results.curves, strict=True):
                _curve(axes, curve)
        figure.savefig(place, format="svg", metadata={"Date": None})


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What measures the same thing in seconds of a clock, under its name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.what == "wall" and row.figure != "jobs":
            groups.setdefault(f"{row.figure}: {row.work}", []).append(row)
    return groups


def _bars(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    """Ours above, the others below, the shortest first."""
    bars = [("fedlora", rows[0].ours, _OURS)]
    for row in sorted(rows, key=lambda row: row.theirs):
        is_floor = "floor" in row.against or "Gram" in row.against
        bars.append((row.against, row.theirs, _FLOOR if is_floor else _THEIRS))
    names, values, colours = zip(*bars, strict=True)
    places = range(len(bars))
    axes.barh(places, values, color=colours, height=0.7)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 6)
    for place, value in zip(places, values, strict=True):
        of_ours = "" if place == 0 else f"  ({number(value / values[0])} ×)"
        axes.text(value * 1.1, place, shown(value, "s") + of_ours, va="center")
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xticks([])
    axes.minorticks_off()
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _curve(axes: Axes, curve: Curve) -> None:
    axes.plot(curve.values, curve.time, "o-", color=_OURS, label="time above the start")
    axes.plot(curve.values, curve.arithmetic, "o--", color=_FLOOR, label="arithmetic of the floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(curve.values, [str(value) for value in curve.values])
    axes.yaxis.set_major_formatter(lambda value, _: f"× {value:g}")
    axes.minorticks_off()
    axes.set_title(f"by {curve.sweep}", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    if curve.sweep == "clients":
        axes.legend(frameon=False, fontsize=8)
