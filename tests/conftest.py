"""What all tests share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.testing
from benchmarks.rows import HEADS, Row, cells
from hypothesis import HealthCheck, settings

from fedlora_cli.files import entries

if TYPE_CHECKING:
    from fedlora_cli.simulation.options import Source

# Nothing here may reach for a network, and no test is judged by how fast a shared machine is.
os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile(
    "fedlora",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedlora")

# Typer builds all commands anew for every call of one, which takes longer than most calls.
typer.testing._get_command = functools.cache(typer.testing._get_command)


#: What tests measured, for the table after the last of them.
_MEASURED = pytest.StashKey[list[Row]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Takes a measured time. It goes into a table with its bar, and fails no test: a machine that
    others use as well may be slow at any moment.
    """
    return request.config.stash.setdefault(_MEASURED, []).append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table of what was measured. A bar that is not reached is said, and no failure."""
    rows = config.stash.get(_MEASURED, [])
    if rows:
        lines = [
            ("measured", *HEADS),
            *((f"{one.figure}: {one.work}", *cells(one)) for one in rows),
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        terminalreporter.section("measured, and not asserted")
        for line in lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            terminalreporter.write_line("  ".join(padded).rstrip())


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every terminal is 80 columns wide and without colour, as in the README."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for ever is stopped sooner; what the real limit costs is measured apart."""
    monkeypatch.setattr("fedlora_cli.formats.peft.patterns.MATCH_LIMIT", 0.1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """The tensors that are read from files, as they are: file and key."""
    seen: list[tuple[Path, str]] = []
    made = entries._tensor

    def tensor(entry: entries.TensorInfo, *place: Any) -> Any:
        seen.append((entry.path, entry.key))
        return made(entry, *place)

    monkeypatch.setattr(entries, "_tensor", tensor)
    return seen


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A tiny model and a few examples of every family of tasks."""
    from support.tasks import make_sources  # other tests do not wait for its libraries

    return make_sources(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def apart(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Nothing is left in anybody's cache of data, and one core is enough for small models."""
    import datasets

    from fedlora_cli.simulation.workers import threads

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    with threads(1):
        yield
