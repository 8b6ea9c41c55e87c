"""What tests of frameworks share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The lines of Flower's log."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("flwr")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)
