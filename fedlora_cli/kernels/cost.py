"""The choice of the fastest route for a module, by estimates of time and memory.

Estimates, not timings: the same input takes the same route on every machine, and gives the same
bytes. This file does not import torch, so that a dry run stays fast. It also defines the limits
that the routes and their estimates share.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Billions of operations per second of one core (AMD EPYC, AVX-512, MKL), from
#: tests/benchmarks/calibrate.py. Only ratios decide, and they vary less between machines.
GEMM = {4: 105.0, 8: 50.0}  # 4096 × 600 and larger, by the bytes of a number
SKINNY = {4: 75.0, 8: 33.0}  # times 80 columns
QR = 24.0  # 4096 × 600 with Q, float64
EIGH = 31.0  # of 5 S³: 35 ms at 600 for the leading 64, as `eigen` finds them
SVD = 55.0  # of 22 S³: 86 ms at 600, U and V too

#: Seconds that do not depend on sizes: Python, small products, tens of calls.
CALLS = 0.002

#: Seconds up to which `qr` is taken, even if another route is faster: `qr` is right for any input,
#: and only `qr` finds the smallest singular values.
QUICK = 0.01

#: Time of the upper triangle of a symmetric product, in blocks, as a share of the whole product.
TRIANGLE = 0.66

#: Extra directions of a subspace iteration. Their spectrum is the part that the filters damp.
SPARE = 16

#: Products with ΔW or ΔWᵀ in an iteration: 6 if the spectrum decays, 60 if it is flat.
PRODUCTS = 18

#: Total rank beyond which `gram` iterates on its core; below, LAPACK is faster.
WHOLE = 1000

#: Smaller side up to which an iteration takes the whole space, and is exact at once.
SMALL = 600

#: Columns that `dense` multiplies at a time. More columns would round more in float32.
CHUNK = 1024

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    """The time and memory of a route for a module, on one core.

    `bytes` is the peak of working memory, with the factors read. `possible` is None, or the reason
    why the route cannot be taken.
    """

    route: str
    seconds: float
    bytes: int
    possible: str | None = None


@dataclass(frozen=True)
class Choice:
    """The route to take, and the estimates for all routes, in a fixed order."""

    route: str
    estimates: tuple[Estimate, ...]

    @property
    def chosen(self) -> Estimate:
        return self.estimate(self.route)

    def estimate(self, route: str) -> Estimate:
        return next(each for each in self.estimates if each.route == route)


@dataclass(frozen=True)
class _Work:
    """A module: its shape, the total rank S of its terms, the rank and dtype of the output."""

    shape: tuple[int, int]
    S: int
    rank: int
    dtype: str

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def both(self) -> int:
        """Rows plus columns: L and R together have this times S entries."""
        return sum(self.shape)

    @property
    def side(self) -> int:
        return min(self.shape)

    @property
    def full(self) -> bool:
        """Whether the total rank reaches the smaller side."""
        return self.side <= self.S

    @property
    def too_full(self) -> str | None:
        return "the total rank reaches the smaller side" if self.full else None

    @property
    def too_exact(self) -> str | None:
        return "float64 needs every digit" if self.dtype == "float64" else None

    @property
    def columns(self) -> int:
        """The number of directions of an iteration."""
        return self.side if self.side <= SMALL else min(self.rank + SPARE, self.side)

    @property
    def read(self) -> int:
        return self.both * self.S * BYTES[self.dtype]

    @property
    def item(self) -> int:
        """Bytes of a number in the routes that use float32 for an output of 16 bits."""
        return 4 if BYTES[self.dtype] == 2 else 8


def choose(shape: tuple[int, int], total_rank: int, rank: int, dtype: str) -> Choice:
    """The route for a module of that shape (out, in): the fastest possible route, or `qr` if that
    is quick.

    >>> choose((4096, 4096), total_rank=600, rank=64, dtype="float32").route
    'gram'
    >>> choose((4096, 4096), total_rank=600, rank=64, dtype="float64").route
    'qr'
    >>> choose((4096, 4096), total_rank=9000, rank=64, dtype="bfloat16").route
    'dense'
    """
    work = _Work(shape, total_rank, rank, dtype)
    qr = _qr(work)
    estimates = (qr, _gram(work), _dense(work), _factored(work))
    if qr.seconds <= QUICK:
        return Choice("qr", estimates)
    possible = (each for each in estimates if each.possible is None)
    return Choice(min(possible, key=lambda each: each.seconds).route, estimates)


def _qr(work: _Work) -> Estimate:
    """QR of both sides and SVD of the core, in float64; if S reaches the side, SVD of ΔW."""
    S, n = work.S, work.both
    if not work.full:
        qr, svd, gemm = (4 * n * S**2 - 8 / 3 * S**3), 22 * S**3, 2 * S**3 + 2 * n * S * work.rank
        memory = work.read + 24 * n * S + 40 * S**2
    else:
        longer = max(work.shape)
        qr, svd = 4 * longer * work.side**2 if longer > work.side else 0, 22 * work.side**3
        gemm = 2 * work.entries * S
        memory = work.read + 8 * n * S + 32 * work.entries
    seconds = qr / QR + svd / SVD + gemm / GEMM[8]
    return _estimate("qr", seconds, memory)


def _gram(work: _Work) -> Estimate:
    S, n, r = work.S, work.both, work.rank
    precision = 8 if work.dtype == "float32" else 4
    gram, core, skinny = 2 * n * S**2 * TRIANGLE, 5 * S**3 * TRIANGLE, 4 * n * S * r
    seconds = gram / GEMM[precision] + core / GEMM[8] + skinny / SKINNY[4]
    if S <= WHOLE:
        seconds += 5 * S**3 / EIGH
    else:
        seconds += 2 * S**2 * (r + SPARE) * PRODUCTS / SKINNY[8]
    # The concatenated factors, six S × S matrices, and a few bases.
    memory = work.read + 4 * n * S + 8 * 6 * S**2 + 28 * n * r
    reason = "Gram matrices square the condition number" if work.dtype == "float64" else None
    return _estimate("gram", seconds, memory, reason or work.too_full)


def _dense(work: _Work) -> Estimate:
    accumulate = 2 * work.entries * work.S
    iterate, exact = _iteration(work, 2 * work.entries)
    seconds = accumulate / GEMM[work.item] + iterate / SKINNY[work.item] + exact / SVD
    # Two sums under different weights, a chunk of terms, and the bases of the iteration.
    chunk = (min(work.S, CHUNK) + work.rank) * work.both
    memory = chunk * (2 * work.item + BYTES[work.dtype]) + 2 * work.item * work.entries
    memory += 8 * work.item * work.both * work.columns
    return _estimate("dense", seconds, memory, None if work.full else work.too_exact)


def _factored(work: _Work) -> Estimate:
    S, n = work.S, work.both
    energy = 2 * n * S**2 * TRIANGLE
    iterate, exact = _iteration(work, 2 * n * S)
    seconds = energy / GEMM[work.item] + iterate / SKINNY[work.item] + exact / SVD
    memory = work.read + work.item * n * S + 8 * work.item * n * work.columns
    return _estimate("factored", seconds, memory, work.too_exact or work.too_full)


def _iteration(work: _Work, product: float) -> tuple[float, float]:
    """Operations of all products, each of `product` operations per column, and of small SVDs."""
    if work.side <= max(SMALL, work.rank + SPARE):
        return 2 * product * work.side, 22.0 * work.side**3
    small = 2 * work.both * work.columns**2 + 22 * work.columns**3
    return PRODUCTS * product * work.columns, PRODUCTS / 4 * small


def _estimate(route: str, nanoseconds: float, memory: float, reason: str | None = None) -> Estimate:
    return Estimate(route, CALLS + nanoseconds * 1e-9, int(memory), reason)
