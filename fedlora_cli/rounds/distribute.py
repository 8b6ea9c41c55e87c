"""The global adapter at each client's own rank, to train from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fedlora_cli import engine, formats, lowrank
from fedlora_cli.adapter import Adapter, widest
from fedlora_cli.clients import Paths, name_folders, paths_of
from fedlora_cli.cohort import Client, align, check_fit, shortened
from fedlora_cli.errors import UsageError
from fedlora_cli.factors import Factors
from fedlora_cli.files.folder import check_apart
from fedlora_cli.lowrank import Svd
from fedlora_cli.render.report.handout import DistributeReport
from fedlora_cli.rounds.handout import check_folder, hand_out, handout_row, nothing
from fedlora_cli.rounds.options import DistributeOptions
from fedlora_cli.rounds.recipients import Recipient, Share, like
from fedlora_cli.version import __version__

DEFAULTS = DistributeOptions()


def distribute(
    source: Path | str,
    output: Path | str,
    clients: Paths = (),
    options: DistributeOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> DistributeReport:
    """Write the adapter in `source` at the rank of every client, into `output/<client>/`, or at
    `options.ranks` into `output/rank-<r>/`.

    Each one applies the best approximation of its rank, module by module, at its own alpha, with
    the leading singular directions first. Heads and other full tensors are copied. `clients` are
    adapter folders, or folders whose children are adapter folders; only their headers are read.
    Raises UsageError, InputError and OutputError; nothing is written then.
    """
    output, places = Path(output), paths_of(clients)
    if bool(places) == bool(options.ranks):
        found = "given with --rank" if places else "neither it nor --rank is given"
        raise UsageError("--like", found, "give one of them")
    adapter = formats.read(Path(source))
    recipients, remarks = (
        (_of_ranks(adapter, options), ())
        if options.ranks
        else _like_clients(adapter, places, options)
    )
    check_apart(output, [adapter.path, *places])
    check_folder(output, force=options.force)

    jobs = options.jobs or engine.available_cores()
    shapes = {name: share.shape for one in recipients for name, share in one.shares.items()}
    names = sorted(adapter.modules)
    parts = engine.run(partial(_decomposed, adapter), names, jobs, stage("decomposing modules"))
    svds = dict(zip(names, parts, strict=True))

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
        base_model=options.base or adapter.facts.base_model,
        rank=adapter.rank,
        clients=tuple(
            handout_row(one, output, size, spectra)
            for one, size in zip(recipients, sizes, strict=True)
        ),
        warnings=(*adapter.notes, *remarks),
        version=__version__,
    )


def _decomposed(adapter: Adapter, name: str) -> Svd:
    factors = adapter.modules[name].read()
    stack = lowrank.stack([factors])
    found, _ = lowrank.svd(stack, torch.ones(factors.rank, dtype=torch.float64))
    return found


def _of_ranks(adapter: Adapter, options: DistributeOptions) -> list[Recipient]:
    """One recipient for every rank, of all that the global adapter has."""
    largest = max(min(module.shape) for module in adapter.modules.values())
    recipients = []
    for rank in sorted(set(options.ranks)):
        if rank > max(largest, adapter.rank):
            found = f"{rank}, where no module has more than {largest} directions"
            raise UsageError("--rank", found, "give a smaller one")
        shares = {
            name: Share(rank, options.alpha or one.scale * rank, one.shape, one.kind)
            for name, one in adapter.modules.items()
        }
        recipients.append(
            Recipient(
                name=f"rank-{rank}",
                shares=shares,
                dtype=options.dtype or widest(one.dtype for one in adapter.modules.values()),
                tensors=adapter.tensors,
                facts=replace(adapter.facts, rslora=False),
            )
        )
    return recipients


def _like_clients(
    adapter: Adapter, places: Sequence[Path], options: DistributeOptions
) -> tuple[list[Recipient], tuple[str, ...]]:
    """One recipient for every client, and remarks about what does not match."""
    named, left_out = name_folders(places)
    clients = [Client(name, formats.read(folder), 1.0) for name, folder in named]
    cohort = align(clients, options.base)
    check_fit(cohort, [adapter], base_declared=options.base is not None)
    recipients, remarks = [], list(left_out)
    for client in cohort.clients:
        own = like(client.name, client.adapter, options.alpha, options.dtype)
        # A head that the global adapter lacks stays what this client made of it.
        tensors = {name: adapter.tensors.get(name, kept) for name, kept in own.tensors.items()}
        facts = own.facts if options.base is None else replace(own.facts, base_model=options.base)
        recipients.append(replace(own, tensors=tensors, facts=facts))
        remarks += client.adapter.notes
        for what, names in (
            ("gets nothing of", set(adapter.modules) - set(own.shares)),
            ("starts at zero, as the global adapter has nothing of it, in",
             set(own.shares) - set(adapter.modules)),
            ("is not given", set(adapter.tensors) - set(own.tensors)),
            ("keeps its own, as the global adapter has none,",
             set(own.tensors) - set(adapter.tensors)),
        ):  # fmt: skip
            if names:
                remarks.append(f"{client.name} {what} {shortened(sorted(names))}")
    return recipients, tuple(remarks)
