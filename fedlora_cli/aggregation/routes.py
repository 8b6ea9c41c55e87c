"""Which route each module takes, known from headers alone."""

from __future__ import annotations

from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.kernels import cost


def route_of(plan: Plan, name: str) -> cost.Choice:
    """How the leading directions of a module will be found."""
    total = sum(one.modules[name].rank for one in plan.adapters if name in one.modules)
    return cost.choose(plan.shape(name), total, plan.rank or 1, plan.dtype)
