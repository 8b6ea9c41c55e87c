"""What a person should know before trusting an aggregation, found in weights and digests alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora_cli.aggregation.influence import lone_holders
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.render.report.aggregate import rank_range
from fedlora_cli.weights import FloatArray


def lone(plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]) -> tuple[str, ...]:
    """A warning for every partition that one client owns, in any module, beyond its share."""
    shares = plan.cohort.samples / plan.cohort.samples.sum()
    adjustable = plan.method.with_quorum is not None and plan.options.quorum is None
    warnings = []
    for (first, last, k), (weight, owned) in lone_holders(plan, weights, bounds).items():
        where = "" if owned == len(weights) else f" in {owned} of {len(weights)} modules"
        warnings.append(
            f"rank index {rank_range(first, last)} comes from {plan.cohort.names[k]} "
            f"alone{where}, with weight {weight:.2f} for {shares[k]:.2f} of the "
            "samples" + ("; --quorum bounds that" if adjustable else "")
        )
    return tuple(warnings)


def fading(plan: Plan, weights: Mapping[str, FloatArray]) -> tuple[str, ...]:
    """A warning where a method that leaves room for the previous adapter was not given one."""
    if not plan.method.uses_previous or plan.previous is not None:
        return ()
    sums = [one.sum(axis=0) for one in weights.values()]
    # Before a robust rule has looked at the updates, nobody knows.
    if all(np.isnan(one).any() or np.allclose(one, 1.0) for one in sums):
        return ()
    return (
        "without --previous, what the holders of a rank index leave of it is lost, as under "
        "flexlora",
    )


def missing_unused(plan: Plan) -> tuple[str, ...]:
    """A warning where `--missing zero` was asked for and makes no difference."""
    if plan.options.missing == "renormalize":
        return ()
    other = replace(plan, options=replace(plan.options, missing="renormalize"))
    pairs = zip(plan.weights().values(), other.weights().values(), strict=True)
    if not all(np.array_equal(one, two, equal_nan=True) for one, two in pairs):
        return ()
    return (f"--missing zero changes nothing under {plan.method.name} with these clients",)


def copies(digests: Mapping[str, str]) -> tuple[str, ...]:
    """A warning for every client whose weights are those of another, to the last byte."""
    first: dict[str, str] = {}
    copies = []
    for name, digest in digests.items():
        original = first.setdefault(digest, name)
        if original != name:
            copies.append(f"{name} has the same weights as {original}; both are counted")
    return tuple(copies)
