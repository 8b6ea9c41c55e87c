"""The statements about servers stand in their sources, if these are installed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.server_sources import STATEMENTS, VERSIONS, Statement

from fedlora_cli.formats.serving import TARGETS

NAMES = {"vllm": "FEDLORA_VLLM", "sglang": "FEDLORA_SGLANG", "llama.cpp": "FEDLORA_LLAMA_CPP"}


def sources_of(server: str) -> Path | None:
    """The folder of a checkout, or the one that an installed package stands in."""
    named = os.environ.get(NAMES[server])
    if named is not None:
        return Path(named)
    found = None if server == "llama.cpp" else find_spec(server)
    return None if found is None or found.origin is None else Path(found.origin).parents[1]


def test_every_server_has_a_version_that_was_read() -> None:
    assert STATEMENTS.keys() == VERSIONS.keys() == NAMES.keys() == TARGETS.keys() - {"peft"}
    assert all(STATEMENTS.values())


EVERYTHING = [(server, one) for server in STATEMENTS for one in STATEMENTS[server]]


@pytest.mark.parametrize(
    ("server", "statement"),
    EVERYTHING,
    ids=[f"{server}: {one.means}" for server, one in EVERYTHING],
)
def test_the_sources_say_so(server: str, statement: Statement) -> None:
    home = sources_of(server)
    if home is None:
        pytest.skip(f"no sources of {server} here; {NAMES[server]} names a folder")
    text = " ".join((home / statement.file).read_text(encoding="utf-8").split())
    assert " ".join(statement.words.split()) in text.replace('" "', "")
