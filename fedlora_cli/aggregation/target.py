"""Whether the server that is to load the output can."""

from __future__ import annotations

from fedlora_cli.aggregation.base_model import ties_embeddings
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.formats.serving import (
    VLLM_RANKS,
    Output,
    asks_for_ties,
    doubts,
    obstacles,
)
from fedlora_cli.formats.terms import config_names


def check_server(plan: Plan, rank: int | None) -> None:
    """Whether `--target` can load what the plan makes, at that rank once it is known.

    All that stands in the way is in one error: a UsageError where options alone are the cause, else
    an InputError.
    """
    options = plan.options
    if options.target is None:
        return
    found_all = obstacles(options.target, _output(plan, rank))
    if not found_all:
        return
    found = f"{options.target} cannot load {', '.join(one.found for one in found_all)}"
    cure = ", ".join(dict.fromkeys(one.cure for one in found_all))
    option = found_all[0].option
    if option is not None and all(one.option == option for one in found_all):
        raise UsageError(option, found, cure)
    raise InputError("--target", found, cure)


def vllm_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM for an adapter of that rank."""
    return next(limit for limit in VLLM_RANKS if limit >= rank)


def server_doubts(plan: Plan) -> tuple[str, ...]:
    """What decides whether `--target` can load the output, and is not known here."""
    target = plan.options.target
    return () if target is None else doubts(target, _output(plan, plan.rank))


def _output(plan: Plan, rank: int | None) -> Output:
    options = plan.options
    adapters = [client.adapter for client in plan.cohort.clients]
    if plan.previous is not None:
        adapters.append(plan.previous)
    tensors = {name: one for adapter in adapters for name, one in adapter.tensors.items()}
    layouts = tuple(plan.layout(name) for name in plan.modules)
    facts = plan.cohort.facts.named_like([adapter.facts for adapter in plan.adapters])
    owners = {one.owner for one in tensors.values() if one.owner is not None}
    selected, saved = config_names(layouts, tensors, owners, facts)
    decided = "--rank" if options.rank is not None else "--energy"
    asks = asks_for_ties(options.target or "", layouts)
    return Output(
        format=plan.cohort.format,
        rank=rank,
        decided=decided if options.rank is not None or options.energy is not None else None,
        layouts=layouts,
        tensors=tensors,
        facts=facts,
        targets=selected.modules,
        saved=saved,
        tied=ties_embeddings(facts.base_model) if asks else None,
    )
