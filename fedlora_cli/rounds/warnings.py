"""Warnings of an aggregation that follow from weights, norms and digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora_cli.aggregation.influence import lone_holders
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.reports.aggregate import ClientRow
from fedlora_cli.robust.median import lower_median
from fedlora_cli.text import rank_range, shortened

#: An update this many times as large as the median has another cause than more data or steps.
OUTSTANDING = 5.0


def lone(plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]) -> tuple[str, ...]:
    """A warning for each range of rank indices that comes from one client beyond its share."""
    shares = plan.cohort.samples / plan.cohort.samples.sum()
    adjustable = plan.method.with_quorum is not None and plan.options.quorum is None
    warnings = []
    for (first, last, k), holder in lone_holders(plan, weights, bounds).items():
        modules = f" in {holder.modules} of {len(weights)} modules"
        where = "" if holder.modules == len(weights) else modules
        warnings.append(
            f"rank index {rank_range(first, last)} comes from {plan.cohort.names[k]} "
            f"{'' if holder.alone else 'nearly '}alone{where}, with weight {holder.weight:.2f} for "
            f"{shares[k]:.2f} of the samples"
            + ("; --quorum or --max-rank bounds that" if adjustable else "")
        )
    return tuple(warnings)


def outstanding(clients: Sequence[ClientRow], options: AggregateOptions) -> tuple[str, ...]:
    """A warning for each large update that is not clipped, each client without samples, and each
    update that is zero.
    """
    middle = lower_median([row.norm or 0.0 for row in clients])
    warnings = [
        f"the update of {row.name} is {row.norm / middle:.3g} times as large as the median; "
        "--clip-norm auto bounds that"
        for row in clients
        if options.clip_norm is None and row.norm and row.norm > OUTSTANDING * middle
    ]
    warnings += [f"{row.name} has 0 samples and no weight" for row in clients if row.samples == 0]
    warnings += [
        f"the update of {row.name} is zero in every module: it is untrained, and still counts"
        for row in clients
        if row.norm == 0
    ]
    return tuple(warnings)


def reduced(clients: Sequence[ClientRow]) -> tuple[str, ...]:
    """Warnings that name the clipped clients and those that a robust rule leaves out."""
    clipped = [
        f"{row.name} to {row.clip:.3g}" for row in clients if row.clip is not None and row.clip < 1
    ]
    distrusted = [row.name for row in clients if row.trust == 0]
    return (
        *([f"--clip-norm scales updates down: {shortened(clipped)}"] if clipped else []),
        *([f"--robust leaves out {shortened(distrusted)}"] if distrusted else []),
    )


def fading(plan: Plan, weights: Mapping[str, FloatArray]) -> tuple[str, ...]:
    """A warning if the method uses a previous adapter and none is given."""
    if not plan.method.uses_previous or plan.previous is not None:
        return ()
    sums = [matrix.sum(axis=0) for matrix in weights.values()]
    # Weights are unknown until a robust rule has compared the updates.
    if all(np.isnan(total).any() or np.allclose(total, 1.0) for total in sums):
        return ()
    return (
        "without --previous, the weight that clients leave at a rank index is lost, as under "
        "flexlora",
    )


def missing_unused(plan: Plan) -> tuple[str, ...]:
    """A warning if `--missing zero` makes no difference."""
    if plan.options.missing == "renormalize":
        return ()
    other = replace(plan, options=replace(plan.options, missing="renormalize"))
    pairs = zip(plan.weights().values(), other.weights().values(), strict=True)
    if not all(np.array_equal(zero, weights, equal_nan=True) for zero, weights in pairs):
        return ()
    return (f"--missing zero changes nothing under {plan.method.name} with these clients",)


def copies(digests: Mapping[str, str]) -> tuple[str, ...]:
    """A warning for every client with the same weights as another, byte by byte."""
    first: dict[str, str] = {}
    copies = []
    for name, digest in digests.items():
        original = first.setdefault(digest, name)
        if original != name:
            copies.append(f"{name} has the same weights as {original}; both are counted")
    return tuple(copies)
