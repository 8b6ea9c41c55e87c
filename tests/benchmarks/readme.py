"""The table in `README.md` of this folder, from `benchmark.json`: no number by hand."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.rows import Results, markdown

RESULTS = Path(__file__).with_name("benchmark.json")
README = Path(__file__).with_name("README.md")

BLOCK = re.compile(r"(<!-- benchmark -->\n)(.*?)(<!-- end -->)", re.S)


def rewrite(results: Results) -> None:
    """Write the table of these results into the document."""
    text = BLOCK.sub(
        lambda found: found[1] + markdown(results) + found[3], README.read_text("utf-8")
    )
    README.write_text(text, encoding="utf-8")
