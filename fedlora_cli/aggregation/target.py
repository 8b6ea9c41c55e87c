"""Checks that the inference server of `--target` can load the output."""

from __future__ import annotations

from fedlora_cli.aggregation.base_model import ties_embeddings
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.formats.server_checks import Output
from fedlora_cli.formats.serving import VLLM_RANKS, asks_for_ties, doubts, obstacles
from fedlora_cli.formats.terms import config_names


def check_server(plan: Plan, rank: int | None) -> None:
    """Raises an error that lists all obstacles for `--target`, at that rank if it is known.

    A UsageError if an option alone causes all of them, else an InputError.
    """
    options = plan.options
    if options.target is None:
        return
    in_the_way = obstacles(options.target, _output(plan, rank))
    if not in_the_way:
        return
    found = f"{options.target} cannot load {', '.join(each.found for each in in_the_way)}"
    cure = ", ".join(dict.fromkeys(each.cure for each in in_the_way))
    option = in_the_way[0].option
    if option is not None and all(each.option == option for each in in_the_way):
        raise UsageError(option, found, cure)
    raise InputError("--target", found, cure)


def vllm_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM for an adapter of that rank."""
    return next(limit for limit in VLLM_RANKS if limit >= rank)


def server_doubts(plan: Plan) -> tuple[str, ...]:
    """Conditions for `--target` that cannot be checked here, such as facts of the base model."""
    target = plan.options.target
    return () if target is None else doubts(target, _output(plan, plan.rank))


def _output(plan: Plan, rank: int | None) -> Output:
    options = plan.options
    adapters = [client.adapter for client in plan.cohort.clients]
    if plan.previous is not None:
        adapters.append(plan.previous)
    tensors = {name: tensor for adapter in adapters for name, tensor in adapter.tensors.items()}
    layouts = tuple(plan.layout(name) for name in plan.modules)
    metadata = plan.cohort.metadata.named_like([adapter.metadata for adapter in plan.adapters])
    owners = {tensor.owner for tensor in tensors.values() if tensor.owner is not None}
    selected, saved = config_names(layouts, tensors, owners, metadata)
    decided = "--rank" if options.rank is not None else "--energy"
    asks = asks_for_ties(options.target or "", layouts)
    return Output(
        format=plan.cohort.format,
        rank=rank,
        decided=decided if options.rank is not None or options.energy is not None else None,
        layouts=layouts,
        tensors=tensors,
        metadata=metadata,
        targets=selected.modules,
        saved=saved,
        tied=ties_embeddings(metadata.base_model) if asks else None,
    )
