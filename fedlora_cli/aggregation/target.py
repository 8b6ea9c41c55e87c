"""Whether the server that is to load the output can."""

from __future__ import annotations

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.formats.peft.serving import TARGETS, Output, obstacles


def check_server(plan: Plan, rank: int | None) -> None:
    """Whether `--target` can load what the plan makes, at that rank once it is known.

    All that stands in the way is in one error: a UsageError where options alone are the cause, else
    an InputError.
    """
    options = plan.options
    if options.target is None:
        return
    if options.target not in TARGETS:
        found = f"{options.target} is not known"
        raise UsageError("--target", found, f"choose one of {', '.join(TARGETS)}")
    adapters = [client.adapter for client in plan.cohort.clients]
    if plan.previous is not None:
        adapters.append(plan.previous)
    decided = "--rank" if options.rank is not None else "--energy"
    output = Output(
        format=plan.cohort.format,
        rank=rank,
        decided=decided if options.rank is not None or options.energy is not None else None,
        layouts=tuple(plan.layout(name) for name in plan.modules),
        tensors={name: one for adapter in adapters for name, one in adapter.tensors.items()},
        facts=plan.cohort.facts,
    )
    found_all = obstacles(options.target, output)
    if not found_all:
        return
    found = f"{options.target} cannot load {', '.join(one.found for one in found_all)}"
    cure = ", ".join(dict.fromkeys(one.cure for one in found_all))
    option = found_all[0].option
    if option is not None and all(one.option == option for one in found_all):
        raise UsageError(option, found, cure)
    raise InputError("--target", found, cure)
