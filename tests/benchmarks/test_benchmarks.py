"""The speed that the project promises, told as ratios in one run; and that what measures it works.

Times fail no test. What does not depend on a clock, as the memory, does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import contenders, figures
from benchmarks.chart import draw
from benchmarks.cohorts import Recipe, write
from benchmarks.models import MODELS
from benchmarks.readme import BLOCK, README, RESULTS
from benchmarks.rows import Curve, Results, Row, by_work, from_json, load, markdown, to_json
from benchmarks.run import renewed
from benchmarks.works import SMALL, Work
from fedlora_cli import read_clients

#: The promised rows of the table: the figure, what was measured, and against what.
PROMISES = (
    ("kernel", "wall", "dense SVD"),
    ("kernel", "wall", "PEFT svd"),
    ("whole command", "wall", "dense SVD"),
    ("whole command", "diagnose, wall", "dense SVD"),
)

_MACHINE = {"processor": "abacus", "cores": 2, "memory": 2**34, "torch": "2"}


@pytest.mark.benchmark
def test_the_whole_benchmark_is_measured_and_its_memory_bounded(
    tmp_path: Path, tell: Callable[[Row], None]
) -> None:
    """A machine that others use as well is slower, but at everything: ratios nearly stay."""
    script = Path(__file__).with_name("run.py")
    command = [sys.executable, str(script), "--output", str(tmp_path), "--scratch", str(tmp_path)]
    subprocess.run(command, check=True)
    results = load(tmp_path / "benchmark.json")

    for row in results.rows:
        tell(row)

    def found(figure: str, what: str, against: str) -> Row:
        [row] = [
            row
            for row in results.rows
            if (row.figure, row.what) == (figure, what) and row.against.startswith(against)
        ]
        return row

    for timed in PROMISES:
        assert found(*timed).ratio > 0
    assert found("whole command", "peak memory", "limit").ratio <= 0.5
    assert found("many clients", "peak memory", "limit").ratio <= 0.7
    assert found("memory", "peak memory", "4 clients").ratio <= 1.25
    assert ElementTree.parse(tmp_path / "benchmark.svg").getroot().tag.endswith("svg")
    assert not list(tmp_path.glob("benchmark-*"))


@pytest.mark.parametrize("name", MODELS)
def test_cohorts_are_read_as_what_they_were_made(name: str, tmp_path: Path) -> None:
    model = MODELS[name].narrowed(64)
    write(tmp_path, Recipe(model, clients=3, layers=2, ranks=(2, 4)))
    cohort = read_clients([tmp_path]).cohort

    assert [client.adapter.rank for client in cohort.clients] == [2, 4, 2]
    assert cohort.dtype == "bfloat16"
    assert len(cohort.modules) == 2 * sum(model.shapes().values())
    modules = cohort.clients[0].adapter.modules.values()
    found = {(max(one.shape), min(one.shape)) for one in modules}
    assert found == set(model.shapes())
    files = [path.read_bytes() for path in sorted(tmp_path.glob("*/*.safetensors"))]
    assert len(set(files)) == len(files)
    numbers = 2 * 2 * model.numbers_per_rank * 2  # layers, rank, bytes
    assert numbers < len(files[0]) < numbers + 20_000


@pytest.mark.parametrize("independent", [False, True])
def test_clients_share_an_update_unless_they_are_independent(
    independent: bool, tmp_path: Path
) -> None:
    write(tmp_path, Recipe(MODELS["square"].narrowed(8), 2, 1, (8,), independent=independent))
    work = contenders.read(tmp_path, "layers.0.proj", rank=8)
    one, other = ((B @ A).flatten() for B, A in work.floats)
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))

    assert abs(cosine) < 0.05 if independent else cosine > 0.9


def test_contenders_do_the_same_work(tmp_path: Path) -> None:
    """What is said to be slower must not be something else."""
    write(tmp_path, Recipe(MODELS["square"].narrowed(32), 3, 1, (2, 4, 8)))
    work = contenders.read(tmp_path, "layers.0.proj", rank=4)
    pairs = zip(work.floats, work.weights, strict=True)
    whole = torch.stack([weight * B @ A for (B, A), weight in pairs]).sum(dim=0).double()
    U, s, Vh = torch.linalg.svd(whole)
    best = (U[:, :4] * s[:4]) @ Vh[:4]

    for name in ("fedlora", "dense", "stacked-qr", "peft-svd", "peft-cat"):
        B, A = contenders.CONTENDERS[name](work)()
        expected = whole if name == "peft-cat" else best
        assert B.shape[1] == (14 if name == "peft-cat" else 4)
        found = B.double() @ A.double()
        if name == "peft-svd":
            found /= found.norm() / expected.norm()  # PEFT 0.18 scales twice, which takes no time
        assert torch.linalg.vector_norm(found - expected) < 1e-5 * s[0]
    [product] = contenders.accumulation(work)()
    assert product.shape == whole.shape
    assert all(one.shape == (14, 14) for one in contenders.gram(work)())


def test_a_figure_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny = replace(SMALL, jobs=Work("bert-base/16", 2, ranks=(2,)))
    [row] = figures.jobs(tiny, tmp_path)

    assert isinstance(row, Row)
    assert min(row.ours, row.theirs) > 0
    assert not list(tmp_path.iterdir())


def test_the_floor_takes_the_cheaper_product() -> None:
    few, many = Work("square", 20), Work("square", 1000)

    assert few.floor((4096, 4096)) == ("gram", 2.0 * 600**2 * 8192)
    assert many.floor((4096, 4096)) == ("accumulation", 2.0 * 30_000 * 4096**2)


def test_rows_know_whether_their_bars_are_reached() -> None:
    row = Row("kernel", "a module", "wall", 2.0, "dense", 100.0)

    assert (row.ratio, row.bar, row.reached) == (50.0, "", None)
    assert replace(row, at_least=50.0).reached is True
    assert replace(row, at_least=51.0).reached is False
    assert replace(row, at_most=0.02).reached is True
    assert replace(row, at_most=0.01).reached is False


def test_results_come_back_from_json_and_are_drawn(tmp_path: Path) -> None:
    rows = (
        Row("kernel", "a module", "wall", 0.05, "dense SVD", 8.0, at_least=50.0),
        Row("kernel", "a module", "wall", 0.05, "two Gram products", 0.02, at_most=2.0),
    )
    results = Results("small", _MACHINE, rows, (Curve("clients", (5, 10), (1.0, 3.0), (1.0, 4.0)),))

    assert from_json(to_json(results)) == results
    assert list(by_work(results)) == ["a module"]
    assert "| wall | 50 ms | dense SVD | 8 s | 160 | ≥ 50 | yes |" in markdown(results)
    assert "| 2.5 | ≤ 2 | no |" in markdown(results)
    for name in ("one.svg", "other.svg"):
        draw(results, tmp_path / name)
    one = (tmp_path / "one.svg").read_bytes()
    assert one == (tmp_path / "other.svg").read_bytes()
    assert b"dense SVD" in one


def test_the_readme_shows_what_was_measured() -> None:
    found = BLOCK.search(README.read_text(encoding="utf-8"))

    assert found is not None
    assert found[2] == markdown(load(RESULTS))


def test_a_figure_that_is_measured_again_takes_the_place_of_the_old_one() -> None:
    before = Results(
        "full",
        _MACHINE,
        (Row("jobs", "w", "wall", 2.0, "one", 3.0), Row("memory", "w", "peak", 1.0, "few", 1.0)),
        (Curve("rank", (8, 16), (1.0, 2.0), (1.0, 4.0)),),
    )
    now = Results("full", _MACHINE, (Row("jobs", "w", "wall", 2.0, "one", 4.0),))

    found = renewed(before, now)

    assert [(row.figure, row.theirs) for row in found.rows] == [("memory", 1.0), ("jobs", 4.0)]
    assert found.curves == before.curves
    with pytest.raises(SystemExit, match="another size or machine"):
        renewed(before, replace(now, size="small"))
