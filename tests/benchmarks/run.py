"""All benchmarks: a table, and with --output benchmark.json and benchmark.svg.

    python tests/benchmarks/run.py [--size small|full] [--only NAME] [--output DIR] [--readme]

`small` takes about two minutes, `full` about a quarter of an hour and 14 GB of disk for a while.
Everything is measured in processes of its own, ours and the others' in one run on the same files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import processes
from benchmarks.figures import FIGURES
from benchmarks.readme import RESULTS, rewrite
from benchmarks.rows import Curve, Results, Row, cells, load, table, to_json
from benchmarks.works import SIZES

_WIDTH = 130


def run(size: str, names: list[str], scratch: Path, console: Console) -> Results:
    """Measure these figures; the console hears of each row as it is there."""
    rows: list[Row] = []
    curves: list[Curve] = []
    for name in names:
        console.print(name, style="bold")
        for one in FIGURES[name](SIZES[size], scratch):
            if isinstance(one, Curve):
                curves.append(one)
            else:
                rows.append(one)
                console.print("  " + "  ".join((one.work, *cells(one))), highlight=False)
    return Results(size, processes.machine(), tuple(rows), tuple(curves))


def renewed(before: Results, now: Results) -> Results:
    """What was measured now, and before it what it does not replace. Every ratio is of one run."""
    if (before.size, before.machine) != (now.size, now.machine):
        raise SystemExit("what --output has is of another size or machine; give another folder")
    figures, sweeps = {row.figure for row in now.rows}, {curve.sweep for curve in now.curves}
    rows = [row for row in before.rows if row.figure not in figures]
    curves = [curve for curve in before.curves if curve.sweep not in sweeps]
    return replace(now, rows=(*rows, *now.rows), curves=(*curves, *now.curves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    only = f"of {', '.join(FIGURES)}; may be repeated; others that --output has already are kept"
    parser.add_argument("--only", choices=FIGURES, action="append", metavar="NAME", help=only)
    parser.add_argument("--output", type=Path, help="where benchmark.json and benchmark.svg go")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    text = f"measure nothing: write {RESULTS.name} of this folder into its README.md"
    parser.add_argument("--readme", action="store_true", help=text)
    chosen = parser.parse_args()
    if chosen.readme:
        rewrite(load(RESULTS))
        return
    results = run(chosen.size, chosen.only or list(FIGURES), chosen.scratch, Console(stderr=True))
    kept = None if chosen.output is None else chosen.output / "benchmark.json"
    if chosen.only and kept is not None and kept.exists():
        results = renewed(load(kept), results)
    console = Console()
    # A file or a pipe has no width of its own.
    Console(width=max(console.width, _WIDTH)).print(table(results))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(to_json(results), encoding="utf-8")
        from benchmarks.chart import draw  # matplotlib is large, and counts as our children's

        draw(results, kept.with_suffix(".svg"))


if __name__ == "__main__":
    main()
