"""The differences between the adapters of a cohort: every value, and the adapters with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

from fedlora_cli.adapters.adapter import Adapter, Module
from fedlora_cli.reports.inspect import Difference
from fedlora_cli.text import shortened

#: The compared properties as text; a dash stands for an unknown value.
_PROPERTIES: dict[str, Callable[[Adapter], str]] = {
    "base model": lambda adapter: adapter.metadata.base_model or "-",
    "revision": lambda adapter: adapter.metadata.revision or "-",
    "task type": lambda adapter: adapter.metadata.task_type or "-",
    "rank": lambda adapter: _set(f"{m.rank}" for m in _by_rank(adapter)),
    "scaling": lambda adapter: _set(f"{m.scale:g}" for m in _by_rank(adapter)).replace("nan", "-"),
    "rsLoRA": lambda adapter: "yes" if adapter.metadata.rslora else "no",
    "dtype": lambda adapter: _set(sorted(m.dtype for m in adapter.modules.values())),
    "target modules": lambda adapter: _set(sorted(n.split(".")[-1] for n in adapter.modules)),
    "dropout": lambda adapter: f"{adapter.metadata.dropout:g}",
    "fan_in_fan_out": lambda adapter: "true" if adapter.metadata.fan_in_fan_out else "false",
}


def differences(adapters: Sequence[tuple[str, Adapter]]) -> tuple[Difference, ...]:
    """The properties that differ between the adapters; two adapters may have one name."""
    compared = {
        property_: [(name, text(adapter)) for name, adapter in adapters]
        for property_, text in _PROPERTIES.items()
    }
    compared["modules"] = _names([(name, adapter.modules) for name, adapter in adapters])
    compared["other tensors"] = _names([(name, adapter.tensors) for name, adapter in adapters])
    for module in sorted({module for _, adapter in adapters for module in adapter.modules}):
        compared[f"shape of {module}"] = [
            (name, " x ".join(map(str, adapter.modules[module].shape)))
            for name, adapter in adapters
            if module in adapter.modules
        ]
    all_ = (_difference(property_, values) for property_, values in compared.items())
    return tuple(difference for difference in all_ if len(difference.values) > 1)


def _difference(property_: str, values: Sequence[tuple[str, str]]) -> Difference:
    adapters: dict[str, list[str]] = {}
    for name, value in values:
        adapters.setdefault(value, []).append(name)
    ordered = sorted(adapters.items(), key=lambda item: _order(item[0]))
    return Difference(property_, tuple((value, tuple(names)) for value, names in ordered))


def _order(value: str) -> tuple[float, str]:
    """A key that sorts numbers by size, before other text."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _names(adapters: Sequence[tuple[str, Collection[str]]]) -> list[tuple[str, str]]:
    """The number of names in each adapter, and the names of other adapters that it lacks."""
    union = {name for _, names in adapters for name in names}
    result = []
    for adapter, names in adapters:
        absent = sorted(union.difference(names))
        without = f", without {shortened(absent)}" if absent else ""
        result.append((adapter, f"{len(names)}{without}"))
    return result


def _by_rank(adapter: Adapter) -> list[Module]:
    return sorted(adapter.modules.values(), key=lambda module: module.rank)


def _set(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
