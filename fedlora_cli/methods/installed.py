"""Methods of installed distributions, by the entry points of the group `fedlora.methods`.

The names come from the metadata of the distributions. A method is imported only when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from fedlora_cli.errors import FedloraError, MethodError
from fedlora_cli.methods.checks import checked
from fedlora_cli.methods.method import Method, titled
from fedlora_cli.text import first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "fedlora.methods"


def entries() -> Mapping[str, tuple[EntryPoint, ...]]:
    """The entry points of all installed distributions, by the name of the method."""
    return _entries(tuple(sys.path))


@cache
def _entries(path: tuple[str, ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    from importlib.metadata import entry_points

    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in sorted(entry_points(group=GROUP), key=distribution_of):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def distribution_of(entry: EntryPoint) -> str:
    """The name and version of the distribution of an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed distribution"


def load(name: str) -> Method:
    """The method of that entry point. Raises MethodError."""
    first, *others = entries()[name]
    distribution = distribution_of(first)
    title = titled(name, distribution)
    if others:
        found = f"{distribution_of(others[0])} has a method of that name too"
        raise MethodError(title, found, "uninstall one of the two")
    try:
        loaded = first.load()
    except FedloraError:
        raise
    except (Exception, SystemExit) as error:
        found = f"it cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise MethodError(title, found, f"reinstall or uninstall {distribution}") from error
    method = checked(loaded, distribution)
    if method.name != name:
        found = f"{first.value} is the method {method.name}"
        raise MethodError(title, found, "give the entry point the name of the method")
    return method


def check_same(method: Method) -> None:
    """Raise MethodError if this process has another version of the method's distribution."""
    if method.distribution is None:
        return
    here = [distribution_of(entry) for entry in entries().get(method.name, ())]
    if here != [method.distribution]:
        import platform

        found = f"the worker on {platform.node()} has {', '.join(here) or 'no such method'}"
        raise MethodError(method.title, found, "install the same version on all machines")
