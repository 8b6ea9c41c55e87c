"""Modules in batches that are neighbors in the files of the adapters, and are read together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.files.entries import DTYPES

#: Most bytes of a group of several modules, in all adapters together: a layer of 20 clients of an
#: 8B model.
MAX_GROUP = 128 * 1024 * 1024

#: The wanted number of groups, so that all cores have work.
_FEWEST = 16

_SIZES = dict(DTYPES.values())


def grouped(adapters: Sequence[Adapter], names: Iterable[str]) -> list[tuple[str, ...]]:
    """The modules in groups, in the order of their names, which is that of the files."""
    ordered = sorted(names)
    sizes = {name: module_bytes(adapters, name) for name in ordered}
    limit = min(MAX_GROUP, sum(sizes.values()) // _FEWEST)
    result: list[tuple[str, ...]] = []
    together: list[str] = []
    size = 0
    for name in ordered:
        # Experts of one pair stay in one group: every group of them reads the whole pair.
        shared = bool(together) and _pair(adapters, name) == _pair(adapters, together[-1])
        if together and size + sizes[name] > (MAX_GROUP if shared else limit):
            result.append(tuple(together))
            together, size = [], 0
        together.append(name)
        size += sizes[name]
    return [*result, tuple(together)] if together else result


def _pair(adapters: Iterable[Adapter], name: str) -> str:
    return next(a.modules[name].layout.pair for a in adapters if name in a.modules)


def module_bytes(adapters: Iterable[Adapter], name: str) -> int:
    """The bytes of one module's factors in the files of these adapters."""
    modules = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
    return sum(module.rank * sum(module.shape) * _SIZES[module.dtype] for module in modules)
