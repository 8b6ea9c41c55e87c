"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Nothing here may reach for a network, and no test is judged by how fast a shared machine is.
os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("fedlora", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fedlora")


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every terminal is 80 columns wide and without colour, as in the README."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
