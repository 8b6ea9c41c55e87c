"""A round of clients that differ in everything they may, for the tests of whole workflows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support import oracle
from support.adapters import Made, Spec, make, truncated

SHAPES = {"layers.0.q_proj": (24, 40), "layers.0.v_proj": (13, 40), "layers.1.fc": (40, 31)}


#: Mixed ranks, alphas, rsLoRA, patterns and sample counts, none of them square or equal.
ROUND = [
    Spec("ann", rank=2, samples=30, alpha=16, shapes=SHAPES),
    Spec("bob", rank=5, samples=11, alpha=3, rslora=True, shapes=SHAPES),
    Spec("cy", rank=3, samples=50, alpha=7, shapes=SHAPES, ranks={"layers.1.fc": 6}),
    Spec("dee", rank=4, samples=9, shapes=SHAPES, alphas={"layers.0.q_proj": 32}),
]


def make_round(root: Path, specs: list[Spec] = ROUND) -> list[Made]:
    return [make(root / "round", spec) for spec in specs]


def expected_update(made: list[Made], module: str, method: str, rank: int | None) -> np.ndarray:
    given = [(*one.factors[module], one.samples) for one in made if module in one.factors]
    update = oracle.aggregate(method, given)
    return update if rank is None else truncated(update, rank)
