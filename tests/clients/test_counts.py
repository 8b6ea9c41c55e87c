"""Sample counts: where they are found, and what is wrong with them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import support.cli
from support.adapters import Spec, make

run = partial(support.cli.run, "aggregate")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 10}', "no count for b"),
        ('{"a": 10, "b": 5, "zoe": 1}', "a count for zoe, which is no client"),
        ('{"a": 10, "b": -1}', "b: -1 samples"),
        ('{"a": 10, "b": true}', "b: True samples"),
        ('{"a": 0, "b": 0}', "all counts are zero"),
        ('{"a": 10, "b": 1e999}', "b: inf samples"),
        ("a,10", "no count for b"),
        ("client,samples\na,10\nb,x", "line 3 has 'x' samples"),
        ("a,10\nb,nan", "b: nan samples"),
        ("a,10\na,10\nb,1", "line 2 names a again"),
        ("a,10,3\nb,1", "line 1 has 3 columns"),
        ('{"a": 1', "not valid JSON"),
    ],
)
def test_bad_sample_counts_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    for name in ("a", "b"):
        make(tmp_path / "round", Spec(name, rank=2, samples=3))
    (tmp_path / "counts").write_text(content)

    counts = ("--samples", str(tmp_path / "counts"))
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), *counts)

    assert result.exit_code == 3
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sample_counts_are_taken_from_the_first_place_that_has_them(tmp_path: Path) -> None:
    from fedlora_cli import read_clients

    make(tmp_path / "round", Spec("a", rank=2, samples=3))
    make(tmp_path / "round", Spec("b", rank=2, samples=None))
    (tmp_path / "round/a/all_results.json").write_text('{"train_samples": 999}')
    (tmp_path / "round/b/train_results.json").write_text('{"train_samples": 7, "eval_loss": NaN}')
    (tmp_path / "counts.csv").write_text("client,samples\nb,20\n\na,10\n")

    told = read_clients([tmp_path / "round"]).cohort.samples
    listed = read_clients([tmp_path / "round"], samples=tmp_path / "counts.csv").cohort.samples

    assert told.tolist() == [3, 7]
    assert listed.tolist() == [10, 20]
