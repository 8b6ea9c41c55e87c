"""Adapters for clients to train from: one folder each, all of them there or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import NewAdapter
from fedlora_cli.errors import InputError, OutputError, UsageError, VerificationError
from fedlora_cli.execution import engine
from fedlora_cli.files.folder import (
    check_space,
    claimed,
    new_folder,
    other_than,
    other_than_folders,
)
from fedlora_cli.formats.terms import LARGEST_ALPHA, LORA_BIAS
from fedlora_cli.linalg.casting import at_rank, cast, described, stored_bytes
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location, Remote
from fedlora_cli.reports.distribution import HandoutRow
from fedlora_cli.rounds.recipients import Recipient

#: Whether adapters in a folder, which nobody else sees yet, may be published. Raises FedloraError.
Check = Callable[[Path], None]

#: The leading directions of a module in float64, at most that many, stored at that scale.
Take = Callable[[str, int, float], Factors]

_foreign = other_than_folders(other_than(formats.FILES))


@contextmanager
def claimed_folder(output: Location, *, force: bool) -> Iterator[None]:
    """No other process writes this folder of adapters in this block. Raises OutputError."""
    # In a store, what is no folder of adapters is found below.
    if not isinstance(output, Remote) and formats.is_adapter(output):
        found = "an adapter, not a folder of adapters"
        raise OutputError(output, found, "choose another output folder")
    with claimed(output, force=force, foreign=_foreign):
        yield


def check_room(recipients: Sequence[Recipient], output: Location) -> None:
    """Whether there is room for all of their adapters, and each could be read again.

    Raises UsageError, InputError and OutputError.
    """
    for one in recipients:
        alpha = max(share.alpha for share in one.modules.values())
        if alpha > LARGEST_ALPHA:
            found = f"{alpha:g} in {one.name}, which no reader of adapters takes"
            raise UsageError("--alpha", found, f"give one of at most {LARGEST_ALPHA:g}")
    check_space(output, sum(_bytes(one) for one in recipients))
    # The largest may be beyond what a reader takes; all of them are held to it when written.
    largest = max(recipients, key=lambda one: sum(map(len, (*one.modules, *one.tensors))))
    formats.FORMATS[largest.format].check_new(_described(largest), {})


def hand_out(
    recipients: Sequence[Recipient],
    take: Take,
    output: Location,
    provenance: Mapping[str, Any],
    *,
    force: bool,
    jobs: int,
    progress: engine.Progress,
    check: Check = lambda folder: None,
) -> tuple[int, ...]:
    """Write `output/<name>/` for every recipient; the bytes of every weights file.

    Where a recipient's rank is beyond the directions that there are, A gets random rows and B zero
    columns: the update is the same, and they can be trained. Every adapter is read back before any
    of them gets its place, and `check` sees them then. Raises InputError, OutputError and
    VerificationError.
    """

    def write(folder: Path, one: Recipient) -> int:
        folder.mkdir()
        chosen = formats.FORMATS[one.format]
        with chosen.writing(_described(one), folder, provenance) as put:
            for name, share in one.modules.items():
                leading = take(name, share.rank, one.scale(name))
                made = cast(leading, one.dtype, f"{one.name}: {name}")
                put(name, at_rank(made, share.rank, name))
            for name in one.tensors:
                put(name, _at_scale(one, name))
        _check_readable(folder, one)
        return (folder / chosen.weights).stat().st_size

    with new_folder(output, force=force, foreign=_foreign) as place:
        sizes = tuple(
            engine.run(lambda one: write(place / one.name, one), recipients, jobs, progress)
        )
        check(place)
        return sizes


def _check_readable(folder: Path, one: Recipient) -> None:
    """Whether its headers say what was to be written. Raises VerificationError."""

    def unreadable(found: str) -> VerificationError:
        return VerificationError(one.name, found, "nothing was written; report this bug")

    try:
        written = formats.read(folder)
    except InputError as error:
        raise unreadable(f"fedlora would not read it again: {error.found}") from error
    there = {name: (module.shape, module.rank) for name, module in written.modules.items()}
    # A file of an older PEFT holds the transposed updates of experts.
    wanted = {
        name: (share.shape[::-1] if share.layout.turned else share.shape, share.rank)
        for name, share in one.modules.items()
    }
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise unreadable(f"fedlora would read {name} in another way")
        if not math.isclose(written.modules[name].scale, one.scale(name), rel_tol=1e-6):
            raise unreadable(f"fedlora would read another scaling of {name}")
    for name in sorted(written.tensors.keys() ^ one.tensors.keys()):
        raise unreadable(f"fedlora would read {name} in another way")


def _described(one: Recipient) -> NewAdapter:
    """What a recipient's adapter will be, without any values."""
    shares, tensors = one.modules, one.tensors
    owners = {tensor.owner for tensor in tensors.values()}
    return NewAdapter(
        factors={
            name: described(share.shape, share.rank, one.dtype) for name, share in shares.items()
        },
        alphas={name: share.alpha for name, share in shares.items()},
        layouts={name: share.layout for name, share in shares.items()},
        tensors={
            name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
            for name, tensor in tensors.items()
        },
        modules_to_save=tuple(sorted(owner for owner in owners if owner is not None)),
        facts=one.facts,
    )


def _at_scale(one: Recipient, name: str) -> Tensor:
    """A full tensor; a bias on lora_B so that the recipient's scaling makes one update of it."""
    tensor = one.tensors[name]
    if tensor.scale is None:
        return tensor.read()
    module = name.removesuffix(LORA_BIAS)
    value = tensor.read()
    return (value.double() * (tensor.scale / one.scale(module))).to(value.dtype)


def nothing(shape: tuple[int, int]) -> Factors:
    """No direction at all of a module of this shape, (out, in)."""
    out_features, in_features = shape
    return Factors(
        torch.zeros(out_features, 0, dtype=torch.float64),
        torch.zeros(0, in_features, dtype=torch.float64),
    )


def distribution_row(
    one: Recipient, output: Location, size: int, spectra: Mapping[str, Tensor]
) -> HandoutRow:
    """What the report says of one adapter. `spectra` are all singular values of what was handed
    out, by module.
    """
    shares = one.modules
    held = {name: min(shares[name].rank, len(s)) for name, s in spectra.items() if name in shares}
    total = sum(float(s.square().sum()) for s in spectra.values())
    kept = sum(float(spectra[name][:rank].square().sum()) for name, rank in held.items())
    directions = sum(share.rank for share in shares.values())
    full = sum(math.prod(tensor.shape) for tensor in one.tensors.values())
    return HandoutRow(
        name=one.name,
        path=str(output / one.name),
        rank=one.rank,
        alpha=_common([share.alpha for share in shares.values()]),
        scaling=_common([one.scale(name) for name in shares]),
        dtype=one.dtype,
        modules=len(shares),
        directions=directions,
        padded=directions - sum(held.values()),
        parameters=full + sum(share.rank * sum(share.shape) for share in shares.values()),
        bytes=size,
        kept_energy=kept / total if total > 0 else None,
    )


def _common(values: Sequence[float]) -> float | None:
    """The value that all of them have."""
    return values[0] if len(set(values)) == 1 else None


def _bytes(one: Recipient) -> int:
    """What its factors and full tensors take in a file."""
    factors = (stored_bytes((s.rank, sum(s.shape)), one.dtype) for s in one.modules.values())
    full = (stored_bytes(tensor.shape, tensor.dtype) for tensor in one.tensors.values())
    return sum(factors) + sum(full)
