"""The speed that the project promises, as a ratio within one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.dense import measure


@pytest.mark.benchmark
def test_commands_are_many_times_faster_than_dense_svds(tmp_path: Path) -> None:
    """Twelve clients of ranks 8 to 64, four modules of 4096 × 4096, bfloat16."""
    timing = measure(tmp_path, size=4096, modules=4)

    assert timing.dense / timing.aggregate >= 15
    assert timing.dense / timing.diagnose >= 8


def test_the_benchmark_itself_runs(tmp_path: Path) -> None:
    timing = measure(tmp_path, size=128, modules=2)

    assert min(timing.aggregate, timing.diagnose, timing.dense) > 0
