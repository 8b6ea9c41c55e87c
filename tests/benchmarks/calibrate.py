"""The cost model of `fedlora_cli.kernels.cost` beside the clock, one core, a grid of shapes.

    python tests/benchmarks/calibrate.py [--dtype float32]

Clients share a decaying update, or have nothing in common: the spectrum decides how often the
iterating routes must multiply. The last column is how much slower the chosen route is than the
best of those that hold.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fedlora_cli.kernels import cost, dense, factored, gram
from fedlora_cli.kernels.leading import Unresolved
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors

GRID = (
    ((768, 768), 120),
    ((768, 768), 600),
    ((1024, 4096), 300),
    ((1024, 4096), 600),
    ((1024, 4096), 1200),
    ((4096, 4096), 80),
    ((4096, 4096), 300),
    ((4096, 4096), 600),
    ((4096, 4096), 1600),
    ((4096, 4096), 5000),
)


def cohort(
    shape: tuple[int, int], total: int, rank: int, kind: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Factors], Tensor]:
    """Clients of ranks rank / 8 to `rank` and together `total`, and weights for each piece.

    "shared": each has its part of one update whose spectrum decays tenfold, and noise of a tenth;
    "independent": random factors, whose spectrum is flat.
    """
    generator = torch.Generator().manual_seed(0)
    ranks: list[int] = []
    while sum(ranks) < total:
        r = max(1, rank // (8, 4, 2, 1)[len(ranks) % 4])
        ranks.append(min(r, total - sum(ranks)))
    U, V = (torch.randn(side, rank, generator=generator) / side**0.5 for side in shape)
    root = torch.logspace(0, -0.5, rank)
    terms = []
    for r in ranks:
        B, A = (torch.randn(side, r, generator=generator) / side**0.5 for side in shape)
        if kind == "shared":
            B, A = (U[:, :r] + 0.1 * B) * root[:r], (V[:, :r] + 0.1 * A) * root[:r]
        terms.append(Factors(B.to(dtype), A.T.contiguous().to(dtype), 2.0))
    share = 1 / len(ranks)
    return terms, torch.cat([torch.full((r,), share, dtype=torch.float64) for r in ranks])


def routes(
    terms: list[Factors], weights: Tensor, rank: int, dtype: str
) -> dict[str, Callable[[], object]]:
    """Every route on the same work, from the factors as they were read."""
    single = torch.float32 if cost.BYTES[dtype] == 2 else torch.float64

    def by_dense() -> object:
        pieces = weights.split([term.rank for term in terms])
        stream = (dense.Term(*pair) for pair in zip(terms, pieces, strict=True))
        total, _ = dense.accumulate(stream, terms[0].shape, single)
        return dense.leading(total, rank, dtype)

    return {
        "qr": lambda: lowrank.svd(lowrank.orthogonalize(terms), weights, rank),
        "gram": lambda: gram.leading(gram.prepare(terms, dtype), weights, rank),
        "dense": by_dense,
        "factored": lambda: factored.leading(factored.prepare(terms, dtype), weights, rank, dtype),
    }


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of a few runs; infinite where the route gives up."""
    best = math.inf
    for _ in range(repeats):
        began = time.thread_time()
        try:
            function()
        except Unresolved:
            return math.inf
        best = min(best, time.thread_time() - began)
        if best > 2:
            break
    return best


def show(*cells: str) -> None:
    """One line of the table."""
    sys.stdout.write(" ".join(cells) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=list(cost.BYTES))
    parser.add_argument("--rank", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = ("qr", "gram", "dense", "factored")
    show(f"{'shape':>12} {'S':>5} {'':12}", *(f"{name + ' ms (est.)':>19}" for name in names))
    for shape, total in GRID:
        choice = cost.choose(shape, total, chosen.rank, chosen.dtype)
        for kind in ("shared", "independent"):
            work = routes(*cohort(shape, total, chosen.rank, kind), chosen.rank, chosen.dtype)
            taken = {}
            for one in choice.estimates:
                possible = one.possible is None and one.seconds < 6
                taken[one.route] = seconds(work[one.route]) if possible else math.inf
            cells = (
                f"{1e3 * taken[one.route]:9.1f} ({1e3 * one.seconds:7.1f})"
                for one in choice.estimates
            )
            slower = taken[choice.route] / min(taken.values())
            show(f"{shape!s:>12} {total:5} {kind:12}", *cells, f" {choice.route} {slower:.2f}")


if __name__ == "__main__":
    main()
