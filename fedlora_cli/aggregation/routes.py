"""The route of each module, chosen from headers alone."""

from __future__ import annotations

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.kernels import cost


def route_of(plan: Plan, name: str) -> cost.Choice:
    """The route that a module takes, with the estimates for all routes."""
    modules = (adapter.modules.get(name) for adapter in plan.adapters)
    total = sum(module.rank for module in modules if module is not None)
    return cost.choose(plan.shape(name), total, plan.rank or 1, plan.dtype)
