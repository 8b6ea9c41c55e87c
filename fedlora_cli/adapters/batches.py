"""Modules in groups: those together that lie side by side in the files of the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.files.entries import DTYPES

#: Bytes of all adapters together that one group holds at most, if it is more than one module: a
#: layer of 20 clients of an 8B model. Then one range of every client's file has it all.
MAX_GROUP = 128 * 1024 * 1024

#: Groups that there should be, so that all cores have work.
_FEWEST = 16

_SIZES = dict(DTYPES.values())


def grouped(adapters: Sequence[Adapter], names: Iterable[str]) -> list[tuple[str, ...]]:
    """These modules, in the order of their names, which is that of the files, cut into groups."""
    ordered = sorted(names)
    sizes = {name: module_bytes(adapters, name) for name in ordered}
    limit = min(MAX_GROUP, sum(sizes.values()) // _FEWEST)
    result: list[tuple[str, ...]] = []
    together: list[str] = []
    size = 0
    for name in ordered:
        # Experts that share factors are read with them, or the factors again for every group.
        shared = bool(together) and _pair(adapters, name) == _pair(adapters, together[-1])
        if together and size + sizes[name] > (MAX_GROUP if shared else limit):
            result.append(tuple(together))
            together, size = [], 0
        together.append(name)
        size += sizes[name]
    return [*result, tuple(together)] if together else result


def _pair(adapters: Iterable[Adapter], name: str) -> str:
    return next(one.modules[name].layout.pair for one in adapters if name in one.modules)


def module_bytes(adapters: Iterable[Adapter], name: str) -> int:
    """What the factors of one module take in the files of these adapters."""
    modules = (one.modules[name] for one in adapters if name in one.modules)
    return sum(one.rank * sum(one.shape) * _SIZES[one.dtype] for one in modules)
