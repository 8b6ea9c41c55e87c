"""Writing adapters for clients, a folder each; either all folders are written or none."""

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
from fedlora_cli.files.untrusted import size_of
from fedlora_cli.formats.terms import LARGEST_ALPHA, LORA_BIAS
from fedlora_cli.linalg.casting import at_rank, cast, described, stored_bytes
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location, Remote
from fedlora_cli.reports.distribution import DistributedRow
from fedlora_cli.rounds.recipients import Recipient

#: A check of the adapters in an unpublished folder. Raises FedloraError.
Check = Callable[[Location], None]

#: The leading directions of a module in float64, by name, largest rank and scale.
Take = Callable[[str, int, float], Factors]

_foreign = other_than_folders(other_than(formats.FILES))


@contextmanager
def claimed_folder(output: Location, *, force: bool) -> Iterator[None]:
    """Exclude other processes from writing this folder in the block. Raises OutputError."""
    # In object storage, the claim below finds such a folder.
    if not isinstance(output, Remote) and formats.is_adapter(output):
        found = "an adapter, not a folder of adapters"
        raise OutputError(output, found, "choose another output folder")
    with claimed(output, force=force, foreign=_foreign):
        yield


def check_room(recipients: Sequence[Recipient], output: Location) -> None:
    """Raise an error if the disk is too small, or if an adapter could not be read again.

    Raises UsageError, InputError and OutputError.
    """
    for recipient in recipients:
        alpha = max(module.alpha for module in recipient.modules.values())
        if alpha > LARGEST_ALPHA:
            found = f"{alpha:g} in {recipient.name}, which is too large to be read"
            raise UsageError("--alpha", found, f"give one of at most {LARGEST_ALPHA:g}")
    check_space(output, sum(_bytes(one) for one in recipients))
    # If the largest adapter can be read, all can; each is checked again when it is written.
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
    """Write `output/<name>/` for every recipient and return the bytes of each weights file.

    If a rank exceeds the number of directions, A gets random rows and B zero columns, which leave
    the update unchanged and can be trained. Every adapter is read back and checked before the
    folder is published. Raises InputError, OutputError and VerificationError.
    """

    def write(folder: Location, one: Recipient) -> int:
        if isinstance(folder, Path):
            folder.mkdir()
        format_ = formats.FORMATS[one.format]
        with format_.writing(_described(one), folder, provenance) as put:
            for name, module in one.modules.items():
                leading = take(name, module.rank, one.scale(name))
                factors = cast(leading, one.dtype, f"{one.name}: {name}")
                put(name, at_rank(factors, module.rank, name))
            for name in one.tensors:
                put(name, _at_scale(one, name))
        _check_readable(folder, one)
        return size_of(folder / format_.weights)

    with new_folder(output, force=force, foreign=_foreign) as place:
        sizes = tuple(
            engine.run(lambda one: write(place / one.name, one), recipients, jobs, progress)
        )
        check(place)
        return sizes


def _check_readable(folder: Location, one: Recipient) -> None:
    """Raise VerificationError unless the headers match the recipient."""

    def unreadable(found: str) -> VerificationError:
        return VerificationError(one.name, found, "nothing was written; report this bug")

    try:
        written = formats.read(folder)
    except InputError as error:
        raise unreadable(f"fedlora would not read it again: {error.found}") from error
    actual = {name: (module.shape, module.rank) for name, module in written.modules.items()}
    # Some versions of PEFT store the transposed updates of experts.
    expected = {
        name: (module.shape[::-1] if module.layout.turned else module.shape, module.rank)
        for name, module in one.modules.items()
    }
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise unreadable(f"fedlora would read {name} differently")
        if not math.isclose(written.modules[name].scale, one.scale(name), rel_tol=1e-6):
            raise unreadable(f"fedlora would read another scaling of {name}")
    for name in sorted(written.tensors.keys() ^ one.tensors.keys()):
        raise unreadable(f"fedlora would read {name} differently")


def _described(one: Recipient) -> NewAdapter:
    """The recipient's adapter, without values."""
    modules, tensors = one.modules, one.tensors
    owners = {tensor.owner for tensor in tensors.values()}
    return NewAdapter(
        factors={
            name: described(module.shape, module.rank, one.dtype)
            for name, module in modules.items()
        },
        alphas={name: module.alpha for name, module in modules.items()},
        layouts={name: module.layout for name, module in modules.items()},
        tensors={
            name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
            for name, tensor in tensors.items()
        },
        modules_to_save=tuple(sorted(owner for owner in owners if owner is not None)),
        metadata=one.metadata,
    )


def _at_scale(one: Recipient, name: str) -> Tensor:
    """A full tensor; a bias on lora_B is rescaled for the recipient's scaling."""
    tensor = one.tensors[name]
    if tensor.scale is None:
        return tensor.read()
    module = name.removesuffix(LORA_BIAS)
    value = tensor.read()
    return (value.double() * (tensor.scale / one.scale(module))).to(value.dtype)


def nothing(shape: tuple[int, int]) -> Factors:
    """Factors of rank 0 for a module of this shape, (out, in)."""
    out_features, in_features = shape
    return Factors(
        torch.zeros(out_features, 0, dtype=torch.float64),
        torch.zeros(0, in_features, dtype=torch.float64),
    )


def distribution_row(
    one: Recipient, output: Location, size: int, spectra: Mapping[str, Tensor]
) -> DistributedRow:
    """The report's row of an adapter; `spectra` are the source's singular values by module."""
    modules = one.modules
    ranks = {
        name: min(modules[name].rank, len(s)) for name, s in spectra.items() if name in modules
    }
    total = sum(float(s.square().sum()) for s in spectra.values())
    kept = sum(float(spectra[name][:rank].square().sum()) for name, rank in ranks.items())
    directions = sum(module.rank for module in modules.values())
    full = sum(math.prod(tensor.shape) for tensor in one.tensors.values())
    return DistributedRow(
        name=one.name,
        path=str(output / one.name),
        rank=one.rank,
        alpha=_common([module.alpha for module in modules.values()]),
        scaling=_common([one.scale(name) for name in modules]),
        dtype=one.dtype,
        modules=len(modules),
        directions=directions,
        padded=directions - sum(ranks.values()),
        parameters=full + sum(module.rank * sum(module.shape) for module in modules.values()),
        bytes=size,
        kept_energy=kept / total if total > 0 else None,
    )


def _common(values: Sequence[float]) -> float | None:
    """The value if all are equal, else None."""
    return values[0] if len(set(values)) == 1 else None


def _bytes(one: Recipient) -> int:
    """The bytes of the factors and full tensors in a file."""
    factors = (stored_bytes((m.rank, sum(m.shape)), one.dtype) for m in one.modules.values())
    full = (stored_bytes(tensor.shape, tensor.dtype) for tensor in one.tensors.values())
    return sum(factors) + sum(full)
