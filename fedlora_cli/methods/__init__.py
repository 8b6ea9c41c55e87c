"""The table of methods, and the methods from outside.

A method in `METHODS` is in `--method`, `fedlora methods`, the README and the contract tests. So is
a registered method and a method of an installed distribution, except for README and tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import NamedTuple

from fedlora_cli.errors import MethodError, UsageError
from fedlora_cli.methods import (
    fedavg,
    ffa,
    flexlora,
    flora,
    hetlora,
    installed,
    raflora,
    rbla,
    residual,
)
from fedlora_cli.methods.checks import NAME, checked
from fedlora_cli.methods.method import Method, titled

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (raflora, residual, flexlora, flora, fedavg, hetlora, rbla, ffa)
}

#: The methods that this process has registered.
_REGISTERED: dict[str, Method] = {}


class Listing(NamedTuple):
    """All methods by name, and the errors of those that cannot be used."""

    methods: dict[str, Method]
    broken: dict[str, MethodError]

    @property
    def distributions(self) -> dict[str, str] | None:
        """The distributions of the installed methods by name, None if there are none."""
        return distributions(self.methods.values())


def register(method: Method) -> None:
    """Add a method for this process; it replaces a registered method of the same name.

    Raises MethodError for a wrong field, and for the name of a method that is built in or
    installed.
    """
    checked(method)
    if method.name in METHODS or method.name in installed.entries():
        owner = "built in" if method.name in METHODS else "installed"
        found = f"a method of this name is {owner}"
        raise MethodError(titled(method.name, None), found, "choose another name")
    _REGISTERED[method.name] = method


def registered(names: set[str]) -> tuple[Method, ...]:
    """The registered methods among these names, to register them in another process."""
    return tuple(method for name, method in _REGISTERED.items() if name in names)


def names() -> tuple[str, ...]:
    """The names of all methods: built in, registered, installed. No method is imported."""
    others = (name for name in installed.entries() if NAME.fullmatch(name))
    return tuple(dict.fromkeys((*METHODS, *_REGISTERED, *others)))


def outside_note() -> str:
    """A sentence with the names of the methods that are not built in, if there are any."""
    outside = [name for name in names() if name not in METHODS]
    return f" Installed: {', '.join(outside)}." if outside else ""


def find(name: str) -> Method:
    """The method of that name. Raises UsageError, with the nearest names, if there is none, and
    MethodError if it is broken.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _REGISTERED:
        return checked(_REGISTERED[name])
    if name in installed.entries():
        return installed.load(name)
    near = get_close_matches(name.lower(), names(), n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise UsageError("--method", f"unknown method {name}", f"{guess}see `fedlora methods`")


def known(name: str) -> Method | None:
    """The method of that name, None if there is none or it is broken."""
    with suppress(UsageError):
        return find(name)
    return None


def listing() -> Listing:
    """All methods, imported."""
    methods: dict[str, Method] = dict(METHODS)
    broken: dict[str, MethodError] = {}
    for name in (*_REGISTERED, *installed.entries()):
        if name in methods:
            for entry in installed.entries()[name]:
                title = titled(name, installed.distribution_of(entry))
                found = "the name is taken by another method"
                broken[title] = MethodError(title, found, "give the method another name")
            continue
        try:
            methods[name] = find(name)
        except MethodError as error:
            broken[name] = error
    return Listing(methods, broken)


def distributions(methods: Iterable[Method]) -> dict[str, str] | None:
    """The distributions of the installed methods among these by name, None if there are none."""
    return {each.name: each.distribution for each in methods if each.distribution} or None
