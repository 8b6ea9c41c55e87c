"""What a person should know before trusting an aggregation, found in weights and digests alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import numpy as np

from fedlora_cli.aggregation.influence import lone_holders
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.reports.aggregate import ClientRow
from fedlora_cli.text import rank_range, shortened

#: An update so many times as large as the median is no matter of more data or of more steps.
OUTSTANDING = 5.0


def lone(plan: Plan, weights: Mapping[str, FloatArray], bounds: Sequence[int]) -> tuple[str, ...]:
    """A warning for every partition that one client owns, in any module, beyond its share."""
    shares = plan.cohort.samples / plan.cohort.samples.sum()
    adjustable = plan.method.with_quorum is not None and plan.options.quorum is None
    warnings = []
    for (first, last, k), one in lone_holders(plan, weights, bounds).items():
        where = (
            "" if one.modules == len(weights) else f" in {one.modules} of {len(weights)} modules"
        )
        warnings.append(
            f"rank index {rank_range(first, last)} comes from {plan.cohort.names[k]} "
            f"{'' if one.alone else 'nearly '}alone{where}, with weight {one.weight:.2f} for "
            f"{shares[k]:.2f} of the samples"
            + ("; --quorum or --max-rank bounds that" if adjustable else "")
        )
    return tuple(warnings)


def outstanding(clients: Sequence[ClientRow], options: AggregateOptions) -> tuple[str, ...]:
    """A warning for every update that is far larger than the others', unless it is clipped, for
    every client that has no vote, and for every update that is zero.
    """
    norms = [row.norm for row in clients if row.norm]
    middle = median_low(norms) if norms else 0.0
    found = [
        f"the update of {row.name} is {row.norm / middle:.3g} times as large as the median; "
        "--clip-norm auto bounds that"
        for row in clients
        if options.clip_norm is None and row.norm and row.norm > OUTSTANDING * middle
    ]
    found += [f"{row.name} has 0 samples: no vote" for row in clients if row.samples == 0]
    found += [
        f"the update of {row.name} is zero in every module: it was not trained, and still counts"
        for row in clients
        if row.norm == 0
    ]
    return tuple(found)


def held_back(clients: Sequence[ClientRow]) -> tuple[str, ...]:
    """Who was clipped, and who is left out by a robust rule."""
    clipped = [
        f"{row.name} to {row.clip:.3g}" for row in clients if row.clip is not None and row.clip < 1
    ]
    distrusted = [row.name for row in clients if row.trust == 0]
    return (
        *([f"--clip-norm scales updates down: {shortened(clipped)}"] if clipped else []),
        *([f"--robust leaves out {shortened(distrusted)}"] if distrusted else []),
    )


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
