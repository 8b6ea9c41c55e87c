"""The table of methods.

A method listed here is in `--method`, `fedlora methods`, the README and the contract tests.
"""

from __future__ import annotations

from difflib import get_close_matches

from fedlora_cli.errors import UsageError
from fedlora_cli.methods import fedavg, ffa, flexlora, flora, hetlora, raflora, rbla, residual
from fedlora_cli.methods.method import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (raflora, residual, flexlora, flora, fedavg, hetlora, rbla, ffa)
}


def find(name: str) -> Method:
    """The method of that name. Raises UsageError, with the nearest names, if there is none."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name.lower(), METHODS, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise UsageError("--method", f"unknown method {name}", f"{guess}see `fedlora methods`")
