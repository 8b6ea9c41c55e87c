"""Clients with the same weights, byte by byte: one upload under two names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.errors import FaultHandler, InputError
from fedlora_cli.execution import engine
from fedlora_cli.files.digests import sha256_of
from fedlora_cli.remote import Location, is_same_file


def digests_of(
    adapters: Sequence[Adapter], jobs: int, progress: engine.Progress, on_fault: FaultHandler
) -> dict[Location, str]:
    """SHA-256 of every weights file, as `sha256sum` prints it, by the adapter's path.

    A file that cannot be read, or that has changed since its header was read, is a fault.
    """

    def digest(adapter: Adapter) -> str | InputError:
        try:
            return sha256_of(adapter.weights_file, adapter.state)
        except InputError as error:
            return error

    digests: dict[Location, str] = {}
    results = engine.run(digest, adapters, jobs, progress)
    for adapter, result in zip(adapters, results, strict=True):
        if isinstance(result, str):
            digests[adapter.path] = result
        else:
            on_fault(result)
    return digests


def check_copies(
    adapters: Sequence[Adapter],
    digests: Mapping[Location, str],
    on_fault: FaultHandler,
    samples: Mapping[Location, float] | None = None,
) -> None:
    """Report every copy of an earlier client's weights to `on_fault`.

    Two links to one file are not copies. With `samples` by the adapter's path, a copy that would
    count differently is a fault of no client: the uploader is unknown, so that neither client may
    displace the other. The place of that fault is a text.
    """
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.path not in digests:
            continue
        original = first.setdefault(digests[adapter.path], adapter)
        if original is not adapter and not _is_one_file(original, adapter):
            found = f"the same weights as {original.path}, to the last byte"
            cure = "count every upload once, or give --allow-copies"
            difference = None if samples is None else _difference(original, adapter, samples)
            places: dict[Location, str | None] = {original.path: None}
            if difference is None:
                on_fault(InputError(adapter.weights_file, found, cure, places))
            else:
                cure = "remove one of them, or give --allow-copies"
                if difference != _CONFIG:
                    cure = f"give both one count in --samples FILE, {cure}"
                found = f"{found}, but {difference}"
                on_fault(InputError(str(adapter.weights_file), found, cure, places))


def _is_one_file(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters were read from one file, and both paths still lead to it."""
    return one.state == other.state and is_same_file(one.weights_file, other.weights_file)


_CONFIG = "its config gives them another meaning"


def _difference(one: Adapter, other: Adapter, samples: Mapping[Location, float]) -> str | None:
    """The difference between two adapters with equal weights; None without any."""
    counts = samples[one.path], samples[other.path]
    if counts[0] != counts[1]:
        return f"{counts[1]:.12g} samples instead of {counts[0]:.12g}"
    return None if _scales(one) == _scales(other) else _CONFIG


def _scales(adapter: Adapter) -> object:
    """The scales and roles that the config gives to the weights."""
    scales = {name: module.scale for name, module in adapter.modules.items()}
    return scales, {name: (one.role, one.scale) for name, one in adapter.tensors.items()}
