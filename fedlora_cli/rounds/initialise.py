"""Round 0: one shared initial adapter, and its prefix for every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedlora_cli import engine, formats, lowrank
from fedlora_cli.adapter import Facts, FullTensor
from fedlora_cli.clients import Paths, name_folders, paths_of
from fedlora_cli.cohort import Client, Cohort, align
from fedlora_cli.errors import InputError, Report, UsageError, refuse
from fedlora_cli.factors import Factors
from fedlora_cli.files.folder import check_apart
from fedlora_cli.render.report.handout import InitReport, TargetRow
from fedlora_cli.rounds.handout import check_folder, hand_out, handout_row, nothing
from fedlora_cli.rounds.heads import head_tensors
from fedlora_cli.rounds.options import SCALING, InitOptions
from fedlora_cli.rounds.recipients import Recipient, Share, like
from fedlora_cli.rounds.skeleton import Skeleton, make_skeleton
from fedlora_cli.stored import seed_of
from fedlora_cli.version import __version__

DEFAULTS = InitOptions()


def initialise(
    base: Path | str,
    output: Path | str,
    clients: Paths = (),
    options: InitOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> InitReport:
    """Write initial adapters for a base model: into `output/rank-<r>/` for every rank, or into
    `output/<client>/` like adapters that clients have.

    Every adapter is the beginning of one: A has the first r of the same random rows, uniform in
    ±1/sqrt(in) as PEFT draws them, and B is zero (in an embedding A is zero and B normal, as PEFT
    has it). Rank index i means the same to everybody from the start, which raFLoRA's weights rely
    on. Only the configuration of the base model is read, and the heads that are trained in full.
    Raises UsageError, InputError and OutputError; nothing is written then.
    """
    output, places = Path(output), paths_of(clients)
    if bool(places) == bool(options.ranks):
        found = "given with --ranks" if places else "neither it nor --ranks is given"
        raise UsageError("--like", found, "give one of them")
    check_apart(output, places)
    check_folder(output, force=options.force)
    cohort, remarks = _cohort(places) if places else (None, ())
    skeleton = _skeleton(str(base), cohort, options)
    heads, drawn = head_tensors(skeleton, str(base), options.revision, options.seed)
    tensors = {name: _full(heads[name], owner) for name, (_, owner) in skeleton.heads.items()}
    recipients = (
        [_of_rank(rank, str(base), skeleton, tensors, options) for rank in sorted({*options.ranks})]
        if cohort is None
        else [_like(client, str(base), skeleton, tensors, options) for client in cohort.clients]
    )
    sizes = hand_out(
        recipients,
        partial(_start, skeleton, options.seed),
        output,
        {"version": __version__, "initial": str(base), "seed": options.seed},
        force=options.force,
        jobs=options.jobs or engine.available_cores(),
        progress=stage("writing adapters"),
    )
    rows = zip(recipients, sizes, strict=True)
    return InitReport(
        base_model=str(base),
        model_class=skeleton.model_class,
        task_type=recipients[0].facts.task_type,
        seed=options.seed,
        output=str(output),
        targets=_targets(skeleton),
        tensors=tuple(sorted(tensors)),
        adapters=tuple(handout_row(one, output, size, {}) for one, size in rows),
        warnings=(
            *remarks,
            *(f"{head} is not in the base model: drawn at random" for head in drawn),
        ),
        version=__version__,
    )


def _cohort(places: Sequence[Path]) -> tuple[Cohort, tuple[str, ...]]:
    named, left_out = name_folders(places)
    cohort = align([Client(name, formats.read(folder), 1.0) for name, folder in named])
    return cohort, (*left_out, *(note for c in cohort.clients for note in c.adapter.notes))


def _skeleton(base: str, cohort: Cohort | None, options: InitOptions) -> Skeleton:
    """The base model with what is adapted: as asked for, or what any of these clients adapts."""
    if cohort is None:
        return make_skeleton(
            base,
            options.revision,
            options.task_type,
            options.target_modules,
            options.modules_to_save,
            options.num_labels,
        )
    saved = [tensor for client in cohort.clients for tensor in client.adapter.tensors.values()]
    skeleton = make_skeleton(
        base,
        options.revision,
        options.task_type or cohort.facts.task_type,
        cohort.modules,
        sorted({tensor.owner for tensor in saved if tensor.owner is not None}),
        options.num_labels,
    )
    for client in cohort.clients:
        for name, module in client.adapter.modules.items():
            if skeleton.shapes.get(name) != module.shape:
                rows, columns = module.shape
                found = f"{name} is {rows} x {columns} there, and not in {base}"
                raise InputError(client.adapter.path, found, "give the base model of these clients")
    return skeleton


def _start(skeleton: Skeleton, seed: int, name: str, rank: int, scale: float) -> Factors:
    """The first `rank` directions of the shared start of a module; none of them has energy."""
    shape = skeleton.shapes[name]
    if skeleton.kinds[name] == "linear":
        return lowrank.pad(nothing(shape), rank, seed_of(name, seed))
    generator = torch.Generator().manual_seed(seed_of(name, seed))
    columns = torch.randn(rank, shape[0], generator=generator, dtype=torch.float64).T
    return Factors(columns, torch.zeros(rank, shape[1], dtype=torch.float64), scale)


def _of_rank(
    rank: int,
    base: str,
    skeleton: Skeleton,
    tensors: Mapping[str, FullTensor],
    options: InitOptions,
) -> Recipient:
    alpha = options.alpha or (options.scaling or SCALING) * rank
    return Recipient(
        name=f"rank-{rank}",
        shares={
            name: Share(rank, alpha, shape, skeleton.kinds[name])
            for name, shape in skeleton.shapes.items()
        },
        dtype=options.dtype or "float32",
        tensors=tensors,
        facts=Facts(
            base_model=base,
            revision=options.revision,
            task_type=options.task_type,
            dropout=options.dropout or 0.0,
            fan_in_fan_out=skeleton.fan_in_fan_out,
        ),
    )


def _like(
    client: Client,
    base: str,
    skeleton: Skeleton,
    tensors: Mapping[str, FullTensor],
    options: InitOptions,
) -> Recipient:
    own = like(client.name, client.adapter, options.alpha, options.dtype)
    dropout = own.facts.dropout if options.dropout is None else options.dropout
    shares = own.shares
    if options.scaling is not None:
        root = 0.5 if own.facts.rslora else 1.0
        shares = {
            name: replace(share, alpha=options.scaling * share.rank**root)
            for name, share in shares.items()
        }
    return replace(
        own,
        shares=shares,
        tensors={name: tensors[name] for name in own.tensors if name in tensors},
        facts=replace(
            own.facts,
            base_model=base,
            revision=options.revision,
            task_type=options.task_type or own.facts.task_type,
            dropout=dropout,
        ),
    )


def _full(tensor: Tensor, owner: str) -> FullTensor:
    """A tensor at hand as one that is saved in full."""

    def read(report: Report = refuse) -> Tensor:
        return tensor

    dtype = str(tensor.dtype).removeprefix("torch.")
    return FullTensor(tuple(tensor.shape), dtype, owner, read)


def _targets(skeleton: Skeleton) -> tuple[TargetRow, ...]:
    """The adapted modules by their last name and shape."""
    counts = Counter((name.rpartition(".")[2], shape) for name, shape in skeleton.shapes.items())
    return tuple(TargetRow(name, shape, number) for (name, shape), number in counts.items())
