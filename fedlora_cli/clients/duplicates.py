"""Clients whose weights are those of another, to the last byte: one upload under two names."""

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
    """SHA-256 of every weights file by the adapter's path, as `sha256sum` prints it: of the bytes
    that its tensors are read from.

    What cannot be read, or is not the file any more whose header was read, goes to `on_fault`.
    """

    def digest(adapter: Adapter) -> str | InputError:
        try:
            return sha256_of(adapter.weights_file, adapter.state)
        except InputError as error:
            return error

    found: dict[Location, str] = {}
    done = engine.run(digest, adapters, jobs, progress)
    for adapter, result in zip(adapters, done, strict=True):
        if isinstance(result, str):
            found[adapter.path] = result
        else:
            on_fault(result)
    return found


def check_copies(
    adapters: Sequence[Adapter],
    digests: Mapping[Location, str],
    on_fault: FaultHandler,
    samples: Mapping[Location, float] | None = None,
) -> None:
    """Whether all weights differ; of equal ones, the first stays.

    One file under two names, by a link, is no copy. Copies go to `on_fault`. If the `samples` are
    given by the adapter's path, copies that would not count the same are nobody's fault, and told
    with a text for the place: whose upload it was is not known, so neither may displace the other.
    """
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.path not in digests:
            continue
        original = first.setdefault(digests[adapter.path], adapter)
        if original is not adapter and not _is_one_file(original, adapter):
            found = f"the same weights as {original.path}, to the last byte"
            cure = "count every upload once, or give --allow-copies"
            differ = None if samples is None else _difference(original, adapter, samples)
            places: dict[Location, str | None] = {original.path: None}
            if differ is None:
                on_fault(InputError(adapter.weights_file, found, cure, places))
            else:
                cure = "take one of them away, or give --allow-copies"
                if differ != _MEANING:
                    cure = f"give both one count in --samples FILE, {cure}"
                found = f"{found}, but {differ}"
                on_fault(InputError(str(adapter.weights_file), found, cure, places))


def _is_one_file(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters were read from one file, which has that name still."""
    return one.state == other.state and is_same_file(one.weights_file, other.weights_file)


_MEANING = "its config gives them another meaning"


def _difference(one: Adapter, other: Adapter, samples: Mapping[Location, float]) -> str | None:
    """In what copies differ although their weights are equal."""
    counts = samples[one.path], samples[other.path]
    if counts[0] != counts[1]:
        return f"{counts[1]:.12g} samples instead of {counts[0]:.12g}"
    return None if _meaning(one) == _meaning(other) else _MEANING


def _meaning(adapter: Adapter) -> object:
    """What the config makes of the weights."""
    scales = {name: module.scale for name, module in adapter.modules.items()}
    return scales, {name: (one.role, one.scale) for name, one in adapter.tensors.items()}
