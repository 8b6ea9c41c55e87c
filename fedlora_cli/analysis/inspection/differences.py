"""In what the adapters of a cohort differ: every value, and who has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from fedlora_cli.adapters.adapter import Adapter, Module
from fedlora_cli.reports.inspect import Difference

#: Names in one value; the rest is counted.
_NAMED = 3

#: What is compared, as text; where an adapter does not say, there is a dash.
_ASPECTS: dict[str, Callable[[Adapter], str]] = {
    "base model": lambda adapter: adapter.facts.base_model or "-",
    "revision": lambda adapter: adapter.facts.revision or "-",
    "task type": lambda adapter: adapter.facts.task_type or "-",
    "rank": lambda adapter: _set(f"{m.rank}" for m in _by_rank(adapter)),
    "scaling": lambda adapter: _set(_scale(m) for m in _by_rank(adapter)),
    "rsLoRA": lambda adapter: "yes" if adapter.facts.rslora else "no",
    "dtype": lambda adapter: _set(sorted(m.dtype for m in adapter.modules.values())),
    "target modules": lambda adapter: _set(sorted(n.split(".")[-1] for n in adapter.modules)),
    "dropout": lambda adapter: f"{adapter.facts.dropout:g}",
    "fan_in_fan_out": lambda adapter: "true" if adapter.facts.fan_in_fan_out else "false",
}


def differences(adapters: Sequence[tuple[str, Adapter]]) -> tuple[Difference, ...]:
    """What is not the same in all of these adapters, which may share names."""
    compared = {
        what: [(name, aspect(adapter)) for name, adapter in adapters]
        for what, aspect in _ASPECTS.items()
    }
    compared["modules"] = _held([(name, list(adapter.modules)) for name, adapter in adapters])
    compared["other tensors"] = _held([(name, list(adapter.tensors)) for name, adapter in adapters])
    for module in sorted({module for _, adapter in adapters for module in adapter.modules}):
        compared[f"shape of {module}"] = [
            (name, " x ".join(map(str, adapter.modules[module].shape)))
            for name, adapter in adapters
            if module in adapter.modules
        ]
    found = (_difference(what, values) for what, values in compared.items())
    return tuple(one for one in found if len(one.values) > 1)


def _difference(what: str, values: Sequence[tuple[str, str]]) -> Difference:
    holders: dict[str, list[str]] = {}
    for name, value in values:
        holders.setdefault(value, []).append(name)
    ordered = sorted(holders.items(), key=lambda item: _order(item[0]))
    return Difference(what, tuple((value, tuple(names)) for value, names in ordered))


def _order(value: str) -> tuple[float, str]:
    """Numbers by their size, before all other text."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _held(adapters: Sequence[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    """How many names each one holds, and which ones of the others' it does not."""
    union = {name for _, names in adapters for name in names}
    result = []
    for holder, names in adapters:
        absent = sorted(union.difference(names))
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        without = f", without {', '.join(absent[:_NAMED])}{more}" if absent else ""
        result.append((holder, f"{len(names)}{without}"))
    return result


def _by_rank(adapter: Adapter) -> list[Module]:
    return sorted(adapter.modules.values(), key=lambda module: module.rank)


def _scale(module: Module) -> str:
    return "-" if math.isnan(module.scale) else f"{module.scale:g}"


def _set(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
