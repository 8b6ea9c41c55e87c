"""The routes by which a module is computed."""

from __future__ import annotations

import pytest

from fedlora_cli.kernels import cost


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module takes that route, whatever it costs."""
    chosen = cost.Choice(route, ())
    monkeypatch.setattr("fedlora_cli.aggregation.module.route_of", lambda *_: chosen)
