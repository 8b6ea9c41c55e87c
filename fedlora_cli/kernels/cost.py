"""Which route is the fastest for a module, and what it needs: an estimate, never a timing.

So the same inputs take the same route everywhere, and give the same bytes. Knows no torch: a dry
run asks too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Billions of operations per second of one core (AMD EPYC, AVX-512, MKL), by
#: tests/benchmarks/calibrate.py. Their ratios decide, and those differ less between machines.
GEMM = {4: 105.0, 8: 50.0}  # 4096 × 600 and larger, by the bytes of a number
SKINNY = {4: 75.0, 8: 33.0}  # times 80 columns
QR = 24.0  # 4096 × 600 with Q, float64
EIGH = 31.0  # of 5 S³: 35 ms at 600 for the leading 64, as `eigen` finds them
SVD = 55.0  # of 22 S³: 86 ms at 600, U and V too

#: Seconds of what does not grow: Python, small products, tens of calls.
CALLS = 0.002

#: Seconds below which `qr` is taken whatever the others take: it is right for any input, and the
#: only one that finds the smallest singular values too.
QUICK = 0.01

#: Share of a whole symmetric product that its upper triangle takes, by blocks.
TRIANGLE = 0.66

#: Directions of an iteration beyond those wanted, as `subspace` takes them.
SPARE = 16

#: Products with ΔW or ΔWᵀ of an iteration: 6 where the spectrum decays, 60 where it is flat.
PRODUCTS = 18

#: Total ranks beyond which `gram` iterates on its core, and sides up to which `subspace` does not.
WHOLE, SMALL = 1000, 600

#: Columns that `dense` holds at a time.
CHUNK = 1024

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    """What a route would take for one module, on one core.

    `bytes` is the peak of working memory with the factors that are read. `possible` is None, or
    says why the route cannot be taken.
    """

    route: str
    seconds: float
    bytes: int
    possible: str | None = None


@dataclass(frozen=True)
class Choice:
    """The route to take, and the estimates of all, in a fixed order."""

    route: str
    estimates: tuple[Estimate, ...]

    @property
    def chosen(self) -> Estimate:
        """What the route would take."""
        return self.estimate(self.route)

    def estimate(self, route: str) -> Estimate:
        """What that route would take."""
        return next(one for one in self.estimates if one.route == route)


@dataclass(frozen=True)
class _Work:
    """One module: its shape, the total rank of its terms, the rank and dtype of the output."""

    shape: tuple[int, int]
    S: int
    rank: int
    dtype: str

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def both(self) -> int:
        """Rows and columns: L and R together have this times S entries."""
        return sum(self.shape)

    @property
    def side(self) -> int:
        return min(self.shape)

    @property
    def full(self) -> bool:
        """Whether the total rank reaches the smaller side."""
        return self.side <= self.S

    @property
    def columns(self) -> int:
        """Directions of an iteration."""
        return self.side if self.side <= SMALL else min(self.rank + SPARE, self.side)

    @property
    def read(self) -> int:
        return self.both * self.S * BYTES[self.dtype]

    @property
    def item(self) -> int:
        """Bytes of a number on the routes that work in float32 for an output of 16 bits."""
        return 4 if BYTES[self.dtype] == 2 else 8


def choose(shape: tuple[int, int], total_rank: int, rank: int, dtype: str) -> Choice:
    """The route for one module of that shape (out, in): the fastest possible one, or `qr` where
    that is quick.

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
    possible = (one for one in estimates if one.possible is None)
    return Choice(min(possible, key=lambda one: one.seconds).route, estimates)


def _qr(work: _Work) -> Estimate:
    """QR of both sides and the SVD of the core, all in float64; of ΔW itself from `side` on."""
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
    # Both stacks, five cores, and a few bases.
    memory = work.read + 4 * n * S + 8 * 6 * S**2 + 28 * n * r
    found = _estimate("gram", seconds, memory)
    if work.dtype == "float64":
        return _impossible(found, "Gram matrices square the condition number")
    if work.full:
        return _impossible(found, "the total rank reaches the smaller side")
    return found


def _dense(work: _Work) -> Estimate:
    accumulate = 2 * work.entries * work.S
    iterate, exact = _iteration(work, 2 * work.entries)
    seconds = accumulate / GEMM[work.item] + iterate / SKINNY[work.item] + exact / SVD
    # The sum, a second one under other weights, a chunk of terms, and the iteration's bases.
    held = (min(work.S, CHUNK) + work.rank) * work.both
    memory = held * (2 * work.item + BYTES[work.dtype]) + 2 * work.item * work.entries
    memory += 8 * work.item * work.both * work.columns
    found = _estimate("dense", seconds, memory)
    if work.dtype == "float64" and not work.full:
        return _impossible(found, "float64 wants every digit")
    return found


def _factored(work: _Work) -> Estimate:
    S, n = work.S, work.both
    energy = 2 * n * S**2 * TRIANGLE
    iterate, exact = _iteration(work, 2 * n * S)
    seconds = energy / GEMM[work.item] + iterate / SKINNY[work.item] + exact / SVD
    memory = work.read + work.item * n * S + 8 * work.item * n * work.columns
    found = _estimate("factored", seconds, memory)
    if work.dtype == "float64":
        return _impossible(found, "float64 wants every digit")
    if work.full:
        return _impossible(found, "the total rank reaches the smaller side")
    return found


def _iteration(work: _Work, product: float) -> tuple[float, float]:
    """Operations of all products, one of which costs `product` a column, and of small SVDs."""
    if work.side <= max(SMALL, work.rank + SPARE):
        return 2 * product * work.side, 22.0 * work.side**3
    small = 2 * work.both * work.columns**2 + 22 * work.columns**3
    return PRODUCTS * product * work.columns, PRODUCTS / 4 * small


def _estimate(route: str, nanoseconds: float, memory: float) -> Estimate:
    return Estimate(route, CALLS + nanoseconds * 1e-9, int(memory))


def _impossible(estimate: Estimate, why: str) -> Estimate:
    return replace(estimate, possible=why)
