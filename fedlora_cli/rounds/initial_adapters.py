"""The initial adapters of round 0: factors, recipients and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora_cli.adapters.adapter import AdapterMetadata, FullTensor, Selection
from fedlora_cli.clients.cohort import Client
from fedlora_cli.errors import FaultHandler, raise_fault
from fedlora_cli.formats.skeleton import Skeleton
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.casting import seed_of
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.rounds.distribution import nothing
from fedlora_cli.rounds.options import SCALING, InitOptions
from fedlora_cli.rounds.recipients import Recipient, RecipientModule, like


def initial_factors(skeleton: Skeleton, seed: int, name: str, rank: int, scale: float) -> Factors:
    """The first `rank` directions of a module's shared initial factors; the update is zero."""
    start = skeleton.modules[name]
    shape = start.shape
    if start.layout.kind != "embedding":
        return lowrank.pad(nothing(shape), rank, seed_of(name, seed))
    generator = torch.Generator().manual_seed(seed_of(name, seed))
    # Column by column: of a whole matrix, torch would draw the last numbers differently.
    columns = [torch.randn(shape[0], generator=generator, dtype=torch.float64) for _ in range(rank)]
    zeros = torch.zeros(rank, shape[1], dtype=torch.float64)
    return Factors(torch.stack(columns, dim=1), zeros, scale)


def recipient_of_rank(
    rank: int,
    base: str,
    skeleton: Skeleton,
    tensors: Mapping[str, FullTensor],
    options: InitOptions,
) -> Recipient:
    alpha = options.alpha or (options.scaling or SCALING) * rank
    return Recipient(
        name=f"rank-{rank}",
        modules={
            name: RecipientModule(one.rank * rank, one.alpha * alpha, one.shape, one.layout)
            for name, one in skeleton.modules.items()
        },
        dtype=options.dtype or "float32",
        tensors=tensors,
        metadata=AdapterMetadata(
            base_model=base,
            revision=options.revision,
            task_type=options.task_type,
            model_class=skeleton.model_class,
            dropout=options.dropout or 0.0,
            fan_in_fan_out=skeleton.fan_in_fan_out,
            target_parameters=skeleton.target_parameters,
            selections=(Selection(skeleton.target_modules),),
            saved_names=options.modules_to_save,
        ),
    )


def recipient_like(
    client: Client,
    base: str,
    skeleton: Skeleton,
    tensors: Mapping[str, FullTensor],
    options: InitOptions,
) -> Recipient:
    copy = like(client.name, client.adapter, options.alpha, options.dtype)
    dropout = copy.metadata.dropout if options.dropout is None else options.dropout
    # Only the model shows which parameter a pair of factors belongs to, a file does not.
    modules = {
        name: replace(module, layout=skeleton.modules[name].layout)
        for name, module in copy.modules.items()
    }
    if options.scaling is not None:
        root = 0.5 if copy.metadata.rslora else 1.0
        modules = {
            name: replace(module, alpha=options.scaling * module.rank**root)
            for name, module in modules.items()
        }
    return replace(
        copy,
        modules=modules,
        tensors={name: tensors[name] for name in copy.tensors if name in tensors},
        metadata=replace(
            copy.metadata,
            base_model=base,
            revision=options.revision,
            task_type=options.task_type or copy.metadata.task_type,
            model_class=skeleton.model_class,
            dropout=dropout,
        ),
    )


def full_tensor(tensor: Tensor, owner: str) -> FullTensor:
    """A tensor in memory as a full tensor."""

    def read(on_fault: FaultHandler = raise_fault) -> Tensor:
        return tensor

    dtype = str(tensor.dtype).removeprefix("torch.")
    return FullTensor(tuple(tensor.shape), dtype, "saved", owner, read)
