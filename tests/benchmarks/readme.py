"""The README's section about speed, from `benchmark.json` beside this file: no number by hand."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.rows import Results, markdown

RESULTS = Path(__file__).with_name("benchmark.json")
README = Path(__file__).parents[2] / "README.md"

BLOCK = re.compile(r"(<!-- benchmark -->\n)(.*?)(<!-- end -->)", re.S)


def rewrite(results: Results) -> None:
    """Put the table of these results into the README."""
    text = BLOCK.sub(
        lambda found: found[1] + markdown(results) + found[3], README.read_text("utf-8")
    )
    README.write_text(text, encoding="utf-8")
