"""Clients whose weights are those of another, to the last byte: one upload under two names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora_cli import engine
from fedlora_cli.adapter import Adapter
from fedlora_cli.errors import InputError, Report
from fedlora_cli.files.digests import sha256_of


def digests_of(
    adapters: Sequence[Adapter], jobs: int, progress: engine.Progress, report: Report
) -> dict[Path, str]:
    """SHA-256 of every weights file by the adapter's path, as `sha256sum` prints it.

    What cannot be read goes to `report`.
    """

    def digest(adapter: Adapter) -> str | InputError:
        try:
            return sha256_of(adapter.weights_file)
        except InputError as error:
            return error

    found: dict[Path, str] = {}
    done = engine.run(digest, adapters, jobs, progress)
    for adapter, result in zip(adapters, done, strict=True):
        if isinstance(result, str):
            found[adapter.path] = result
        else:
            report(result)
    return found


def check_copies(adapters: Sequence[Adapter], digests: Mapping[Path, str], report: Report) -> None:
    """Whether all weights differ; of equal ones, the first stays.

    One file under two names, by a link, is no copy. Copies go to `report`.
    """
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.path not in digests:
            continue
        original = first.setdefault(digests[adapter.path], adapter)
        if original is not adapter and not original.weights_file.samefile(adapter.weights_file):
            found = f"the same weights as {original.path}, to the last byte"
            cure = "count every upload once, or give --allow-copies"
            report(InputError(adapter.weights_file, found, cure))
