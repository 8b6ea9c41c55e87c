"""Distribution: the global adapter at each client's rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata, read_modules
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.clients.cohort import Cohort, with_earlier
from fedlora_cli.clients.reading import Paths, paths_of, read_without_counts
from fedlora_cli.errors import UsageError
from fedlora_cli.execution import engine
from fedlora_cli.files.folder import check_apart
from fedlora_cli.files.locations import location
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.lowrank import Svd
from fedlora_cli.remote import Location
from fedlora_cli.reports.distribution import DistributedModule, DistributeReport
from fedlora_cli.reports.provenance import check_manifest
from fedlora_cli.rounds.distribution import (
    check_room,
    claimed_folder,
    distribution_row,
    hand_out,
    nothing,
)
from fedlora_cli.rounds.options import DistributeOptions
from fedlora_cli.rounds.recipients import Recipient, RecipientModule, like
from fedlora_cli.text import shortened
from fedlora_cli.version import __version__

DEFAULTS = DistributeOptions()


def distribute(
    source: Location | str,
    output: Location | str,
    clients: Paths = (),
    options: DistributeOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> DistributeReport:
    """Write the adapter in `source` at the rank of every client, into `output/<client>/`, or at
    `options.ranks` into `output/rank-<r>/`.

    Each adapter is the best approximation of its rank, module by module, at the client's alpha,
    with the leading singular directions first. Heads and other full tensors are copied. `clients`
    are adapter folders, or folders whose children are adapter folders; only headers are read.
    Raises UsageError, InputError and OutputError; no file is written then.
    """
    source, output, places = location(source), location(output), paths_of(clients)
    if bool(places) == bool(options.ranks):
        found = "given with --rank" if places else "neither --like nor --rank is given"
        raise UsageError("--like", found, "give one of them")
    if options.adapter is not None and not places:
        raise UsageError("--adapter", "given without --like", "give both or neither")
    check_manifest(source)
    adapter = formats.read(source)
    cohort, adapter, left_out = _cohort(adapter, places, options) if places else (None, adapter, ())
    read = [] if cohort is None else [client.adapter.path for client in cohort.clients]
    check_apart(output, [adapter.path, *places, *read])
    recipients, remarks = (
        ([recipient_of_rank(adapter, rank, options) for rank in sorted({*options.ranks})], ())
        if cohort is None
        else _like_clients(adapter, cohort, options)
    )
    with claimed_folder(output, force=options.force):
        check_room(recipients, output)
        jobs = options.jobs or engine.available_cores()
        shapes = {name: module.shape for one in recipients for name, module in one.modules.items()}
        names = sorted(adapter.modules)
        work, progress = grouped([adapter], names), stage("decomposing modules")
        svds: dict[str, Svd] = {}
        for group in engine.run(partial(_decomposed, adapter), work, jobs, progress):
            svds |= group

        def take(name: str, rank: int, scale: float) -> Factors:
            if name not in svds:
                return nothing(shapes[name])
            U, s, Vh = svds[name].U, svds[name].s, svds[name].Vh
            return lowrank.split(Svd(U[:, :rank], s[:rank], Vh[:rank]), "balanced", scale)

        sizes = hand_out(
            recipients,
            take,
            output,
            {"version": __version__, "distributed": adapter.path.resolve().name},
            force=options.force,
            jobs=jobs,
            progress=stage("writing adapters"),
        )
    spectra = {name: one.s for name, one in svds.items()}
    return DistributeReport(
        source=str(source),
        output=str(output),
        base_model=options.base or adapter.metadata.base_model,
        rank=adapter.rank,
        clients=tuple(
            distribution_row(one, output, size, spectra)
            for one, size in zip(recipients, sizes, strict=True)
        ),
        modules=tuple(
            _handed(name, adapter.modules[name].shape, spectra[name], recipients) for name in names
        ),
        warnings=(*adapter.notes, *left_out, *remarks),
        version=__version__,
    )


def _decomposed(adapter: Adapter, names: Sequence[str]) -> dict[str, Svd]:
    result = {}
    for name, factors in read_modules(adapter, names).items():
        ones = torch.ones(factors.rank, dtype=torch.float64)
        result[name], _ = lowrank.svd(lowrank.orthogonalize([factors]), ones)
    return result


def _handed(
    name: str, shape: tuple[int, int], s: Tensor, recipients: Sequence[Recipient]
) -> DistributedModule:
    energy = s.square().cumsum(0)
    ranks = [min(one.modules[name].rank, len(s)) for one in recipients if name in one.modules]
    kept = [float(energy[rank - 1] / energy[-1]) for rank in ranks if rank > 0]
    return DistributedModule(
        name=name,
        shape=shape,
        singular_values=tuple(s.tolist()),
        least_kept=min(kept, default=None),
        most_kept=max(kept, default=None),
    )


def recipient_of_rank(adapter: Adapter, rank: int, options: DistributeOptions) -> Recipient:
    """A recipient of every module and tensor at one rank. Raises UsageError for one too large."""
    largest = max(min(module.shape) for module in adapter.modules.values())
    if rank > max(largest, adapter.rank):
        found = f"{rank}, where no module has more than {largest} directions"
        raise UsageError("--rank", found, "give a smaller one")
    return Recipient(
        name=f"rank-{rank}",
        modules={
            name: RecipientModule(
                rank, options.alpha or module.scale * rank, module.shape, module.layout
            )
            for name, module in adapter.modules.items()
        },
        dtype=options.dtype or adapter.dtype,
        tensors=adapter.tensors,
        metadata=replace(_metadata(adapter, options), rslora=False),
        format=adapter.format,
    )


def _cohort(
    adapter: Adapter, places: Sequence[Location], options: DistributeOptions
) -> tuple[Cohort, Adapter, tuple[str, ...]]:
    """The clients, the global adapter in their orientation, and remarks. Raises InputError."""
    cohort, remarks = read_without_counts(places, options.base, options.adapter)
    cohort, [adapter] = with_earlier(cohort, [adapter], base_declared=options.base is not None)
    return cohort, adapter, remarks


def _like_clients(
    adapter: Adapter, cohort: Cohort, options: DistributeOptions
) -> tuple[list[Recipient], tuple[str, ...]]:
    """A recipient for every client, and remarks about modules and tensors on one side alone."""
    recipients = []
    differing: dict[str, list[str]] = {}
    for client in cohort.clients:
        copy = like(client.name, client.adapter, options.alpha, options.dtype)
        # A head that the global adapter lacks stays the client's.
        tensors = {n: adapter.tensors.get(n, kept) for n, kept in copy.tensors.items()}
        recipients.append(
            replace(copy, tensors=tensors, metadata=_metadata(client.adapter, options))
        )
        for before, names, after in (
            ("without ", set(adapter.modules) - set(copy.modules), ", not adapted there"),
            ("", set(copy.modules) - set(adapter.modules), " starts at zero"),
            (
                "without ",
                set(adapter.tensors) - set(copy.tensors),
                ", not trained in full there",
            ),
            ("", set(copy.tensors) - set(adapter.tensors), " stays as it was"),
        ):
            why = "" if before else ", because the global adapter lacks it"
            if names:
                remark = f"{before}{shortened(sorted(names))}{after}{why}"
                differing.setdefault(remark, []).append(client.name)
    return recipients, tuple(f"{shortened(names)}: {remark}" for remark, names in differing.items())


def _metadata(adapter: Adapter, options: DistributeOptions) -> AdapterMetadata:
    """The adapter's metadata, with the declared base model if there is one."""
    if options.base is None:
        return adapter.metadata
    return replace(adapter.metadata, base_model=options.base)
