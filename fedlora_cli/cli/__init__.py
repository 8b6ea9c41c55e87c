"""The command line: options in, one call, one render, an exit code. No torch at start."""

from __future__ import annotations

from fedlora_cli.cli.app import app, main

__all__ = ["app", "main"]
