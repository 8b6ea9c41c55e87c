"""Runs that are killed, stopped, or race: the adapter is the old one or the new one, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.rows import Row

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

#: How often a run is killed, stopped and raced.
FEW = (10, 5, 3)
MANY = (200, 60, 20)

SEED = 20


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"]
)
def results(request, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("torture")
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "support.torture", str(root), *map(str, (SEED, *request.param))],
        # Threads do not live through a fork.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(tests)},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(found, indent=2))  # noqa: T201
    assert [path.name for path in root.iterdir()] == ["out"]
    return found


def test_a_killed_run_leaves_the_old_adapter_or_the_new_one(
    results: dict[str, Any], tell: Callable[[Row], None]
) -> None:
    """And what else it leaves is gone after the next run. How many were killed when, by a clock, is
    told: a good run has enough on either side of the publication.
    """
    killed = results["killed"]

    assert killed["torn"] == []
    assert set(killed["codes"]) <= {"-9", "0"}
    assert killed["codes"]["-9"] > 0
    assert killed["unswept"] == []
    if killed["codes"]["-9"] == MANY[0]:
        counts = {**killed["outcomes"], "temporaries": killed["temporaries"]}
        for what, bar in (
            ("before publication", 20),
            ("after publication", 5),
            ("temporaries", 20),
        ):
            row = Row("torture", "killed", what, counts.get(what, 0), "a bar", bar, "×", cost=True)
            tell(replace(row, at_least=1.0))


def test_a_run_that_is_asked_to_stop_leaves_nothing_else(results: dict[str, Any]) -> None:
    stopped = results["stopped"]

    assert stopped["torn"] == []
    # -15 is before the command has begun to listen.
    assert set(stopped["codes"]) <= {"143", "0", "-15"}
    assert stopped["temporaries"] == stopped["locks"] == 0


def test_of_two_runs_at_once_one_wins_and_the_other_waits_or_is_refused(
    results: dict[str, Any],
) -> None:
    raced = results["raced"]

    assert raced["wrong"] == []
    assert set(raced["codes"]) <= {"0 4", "0 0"}
