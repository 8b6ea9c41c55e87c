"""The figures: each makes its cohort, measures, and yields lines of the table.

Where all modules would take hours, one of every pair of sides is measured and counted as often as
the model has it; the line says "by sample". The floor is to read every byte once and, in float32
at the rate of this machine on all cores, the two Gram products of every module (2 S² (out + in)
flop) or, where that is less, the sum of the updates as one product (2 S out in flop).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from benchmarks import processes
from benchmarks.models import Model, Module
from benchmarks.processes import Usage
from benchmarks.rows import Curve, Row
from benchmarks.works import Size, Work

#: Of the output: the largest that a client has.
_RANK = 64

#: So many clients are enough to measure at what rate their updates are summed.
_ENOUGH = 64

#: What the project promises of the peak memory.
_LIMIT = 2e9


@contextmanager
def made(work: Work, scratch: Path) -> Iterator[Path]:
    """The cohort's folder, which is gone afterwards, with a free place `out` beside it."""
    place = Path(mkdtemp(prefix="benchmark-", dir=scratch))
    numbers = ("--clients", work.clients, "--layers", work.layers)
    ranks = ("--ranks", ",".join(map(str, work.ranks)))
    worst = ("--independent",) if work.independent else ()
    try:
        processes.script("cohorts", place / "in", "--model", work.model, *numbers, *ranks, *worst)
        yield place / "in"
    finally:
        shutil.rmtree(place)


def aggregated(cohort: Path, repeat: int = 1, jobs: int = 0, cluster: str = "") -> Usage:
    """The medians of `fedlora aggregate`, whole."""
    options: tuple[str, ...] = ("--jobs", str(jobs)) if jobs else ()
    options += ("--cluster", cluster) if cluster else ()
    output = cohort.with_name("out")
    runs = []
    for _ in range(repeat):
        runs.append(processes.fedlora("aggregate", cohort, "-o", output, *options))
        shutil.rmtree(output)
    return Usage(
        median(one.wall for one in runs),
        median(one.cpu for one in runs),
        max(one.peak for one in runs),
    )


def name_of(model: Model, module: Module) -> str:
    """That of the first layer's, with the number of its experts."""
    return f"{model.prefix}0.{module.name}*{module.experts}"


def by_sample(cohort: Path, work: Work, contender: str, threads: int) -> float:
    """Seconds for all modules, from one of every pair of sides."""
    model = work.shape
    names = {name_of(model, module): sides for sides, module in model.examples().items()}
    found = processes.contenders(cohort, names, [contender], threads, 1, rank=_RANK)
    counts = model.shapes()
    return work.layers * sum(counts[names[name]] * found[name][contender] for name in names)


def floor(cohort: Path, work: Work) -> float:
    """Seconds to read every byte and to make the cheaper product of every module."""
    model, counts = work.shape, work.shape.shapes()
    total = min(processes.read_seconds(cohort) for _ in range(2))
    for product in ("gram", "accumulation"):
        clients = work.clients if product == "gram" else min(work.clients, _ENOUGH)
        names = {
            name_of(model, module): sides
            for sides, module in model.examples().items()
            if work.floor(sides)[0] == product
        }
        if names:
            found = processes.contenders(
                cohort, names, [product], processes.cores(), 5, clients=clients, of=min
            )
            seconds = sum(counts[names[name]] * found[name][product] for name in names)
            total += work.layers * seconds * work.clients / clients
    return total


def kernel(size: Size, scratch: Path) -> Iterator[Row]:
    """The arithmetic of one module, on one core; dense SVDs have all cores."""
    bars = size.has_bars
    for work in size.kernels:
        side = work.shape.modules[0].rows
        words = f"one module, {side} × {side}, {work.clients} clients, S = {work.total_rank}"
        words += ", all independent" if work.independent else ""
        name = name_of(work.shape, work.shape.modules[0])
        with made(work, scratch) as cohort:
            alike = ["fedlora", "gram", "stacked-qr"]
            found = processes.contenders(cohort, [name], alike, 1, 5)[name]
            heavy = ["dense", "peft-svd", "peft-cat"]
            cores, repeat = processes.cores(), size.repeat
            all_cores = processes.contenders(cohort, [name], heavy, cores, repeat)[name]
        ours = found["fedlora"]

        def row(against: str, theirs: float, words: str = words, ours: float = ours) -> Row:
            return Row("kernel", words, "wall", ours, against, theirs)

        yield replace(
            row("two Gram products, float32", found["gram"]),
            cost=True,
            at_most=3.0 if bars else None,
        )
        yield replace(
            row("dense SVD, all cores", all_cores["dense"]), at_least=50.0 if bars else None
        )
        yield row("QR of both stacks, SVD", found["stacked-qr"])
        yield row("PEFT svd, all cores", all_cores["peft-svd"])
        cat = f"PEFT cat, which keeps rank {work.total_rank}"
        yield replace(row(cat, all_cores["peft-cat"]), cost=True)


def whole(size: Size, scratch: Path) -> Iterator[Row]:
    """The command, from the start of Python to its end, against all that can be said of it."""
    work, bars = size.whole, size.has_bars
    with made(work, scratch) as cohort:
        usage = aggregated(cohort, size.repeat)
        least = floor(cohort, work)
        diagnosis = processes.fedlora("diagnose", cohort)
        dense = by_sample(cohort, work, "dense", processes.cores())
        stacked = by_sample(cohort, work, "stacked-qr", 1)
        size_of_all = processes.weight_bytes(cohort)
    words, at_most = work.words, 3.0 if bars else None

    def row(what: str, ours: float, against: str, theirs: float) -> Row:
        return Row("whole command", words, what, ours, against, theirs)

    yield replace(row("wall", usage.wall, "floor", least), cost=True, at_most=at_most)
    against = f"dense SVD of {work.modules} modules, by sample"
    yield replace(row("wall", usage.wall, against, dense), at_least=100.0 if bars else None)
    yield row("wall", usage.wall, "QR of both stacks, SVD, one core, by sample", stacked)
    yield replace(row("CPU", usage.cpu, "its wall", usage.wall), cost=True)
    yield _memory("whole command", words, usage, bars=bars)
    peak = row("peak memory", usage.peak, "all inputs", size_of_all)
    yield replace(peak, unit="B", cost=True)
    diagnosed = row("diagnose, wall", diagnosis.wall, against, dense)
    yield replace(diagnosed, at_least=8.0 if bars else None)


def many(size: Size, scratch: Path) -> Iterator[Row]:
    """As many clients as there may be: memory, and the floor."""
    work, bars = size.many, size.has_bars
    with made(work, scratch) as cohort:
        usage, least = aggregated(cohort), floor(cohort, work)
    yield _memory("many clients", work.words, usage, bars=bars)
    yield Row("many clients", work.words, "wall", usage.wall, "floor", least, cost=True)


def memory(size: Size, scratch: Path) -> Iterator[Row]:
    """The same total rank from few clients and from many."""
    peaks = []
    for work in (size.few_large, size.many_small):
        with made(work, scratch) as cohort:
            peaks.append(aggregated(cohort).peak)
    few, many = size.few_large, size.many_small
    words = f"{many.words}, rank {many.ranks[0]}"
    against = f"{few.clients} clients, rank {few.ranks[0]}"
    row = Row("memory", words, "peak memory", peaks[1], against, peaks[0], unit="B", cost=True)
    yield replace(row, at_most=1.15 if size.has_bars else None)


def jobs(size: Size, scratch: Path) -> Iterator[Row]:
    """Two modules at a time against one; the bar is for two cores or more."""
    work = size.jobs
    with made(work, scratch) as cohort:
        pairs = [
            (aggregated(cohort, jobs=1).wall, aggregated(cohort, jobs=2).wall)
            for _ in range(size.repeat)
        ]
    one, two = sorted(pairs, key=lambda pair: pair[0] / pair[1])[len(pairs) // 2]
    row = Row("jobs", work.words, "wall, --jobs 2", two, "--jobs 1", one)
    yield replace(row, at_least=1.6 if size.has_bars and processes.cores() >= 2 else None)


def cluster(size: Size, scratch: Path) -> Iterator[Row]:
    """Threads, processes and Dask, as many of each as there are cores, on the same work."""
    work, cores = size.cluster, processes.cores()
    with made(work, scratch) as cohort:
        threads = aggregated(cohort)
        apart = aggregated(cohort, cluster=f"processes:{cores}")
        dask = aggregated(cohort, cluster=f"local:{cores}")

    def row(what: str, ours: float, against: str, theirs: float) -> Row:
        return Row("cluster", work.words, what, ours, against, theirs, cost=True)

    yield row(f"wall, processes:{cores}", apart.wall, f"{cores} threads", threads.wall)
    bar = 1.5 if size.has_bars else None
    against = f"processes:{cores}"
    yield replace(row(f"wall, local:{cores}", dask.wall, against, apart.wall), at_most=bar)


def models(size: Size, scratch: Path) -> Iterator[Row]:
    """Other shapes, each against its floor and, where one takes seconds, its dense SVDs."""
    for work in size.models:
        sides = work.shape.examples()
        with made(work, scratch) as cohort:
            usage, least = aggregated(cohort, size.repeat), floor(cohort, work)
            yield Row("models", work.words, "wall", usage.wall, "floor", least, cost=True)
            if max(large * small**2 for large, small in sides) <= 4096**3:
                dense = by_sample(cohort, work, "dense", processes.cores())
                against = "dense SVDs, by sample"
                yield Row("models", work.words, "wall", usage.wall, against, dense)
            yield _memory("models", work.words, usage, bars=size.has_bars)


def growth(size: Size, scratch: Path) -> Iterator[Row | Curve]:
    """How the time above that of starting grows, beside the arithmetic of the floor."""
    with made(Work("bert-base/16", 2, ranks=(1,)), scratch) as cohort:
        start = aggregated(cohort, 3)
    yield Row("growth", "a few kilobytes", "wall: start", start.wall, "CPU", start.cpu, cost=True)
    sweeps: dict[str, tuple[Work, ...]] = {
        "clients": size.by_clients,
        "rank": size.by_rank,
        "width": size.by_width,
    }
    for sweep, works in sweeps.items():
        if not works:
            continue
        values = [_value(sweep, work) for work in works]
        seconds = []
        for work in works:
            with made(work, scratch) as cohort:
                seconds.append(max(aggregated(cohort, size.repeat).wall - start.wall, 1e-3))
        grown = [one / seconds[0] for one in seconds]
        arithmetic = [work.flop / works[0].flop for work in works]
        yield Curve(sweep, tuple(values), tuple(grown), tuple(arithmetic))
        for value, ours, theirs in list(zip(values, grown, arithmetic, strict=True))[1:]:
            what = f"{sweep} {values[0]} → {value}: wall above the start"
            against = "arithmetic of the floor"
            yield Row(
                "growth", _fixed(sweep, works[0]), what, ours, against, theirs, "×", cost=True
            )


def _value(sweep: str, work: Work) -> int:
    """Where a work stands on the axis of its sweep."""
    if sweep == "clients":
        return work.clients
    return work.ranks[0] if sweep == "rank" else work.shape.modules[0].columns


def _fixed(sweep: str, work: Work) -> str:
    """What stays the same while a sweep goes on."""
    if sweep == "clients":
        return f"growth by clients, 1 layer of {work.model}, ranks {min(work.ranks)} to {_RANK}"
    where = f"1 layer of {work.model}" if sweep == "rank" else "1 layer, all widths in proportion"
    return f"growth by {sweep}, {work.clients} clients of {where}"


def _memory(figure: str, words: str, usage: Usage, *, bars: bool) -> Row:
    row = Row(figure, words, "peak memory", usage.peak, "limit", _LIMIT, unit="B", cost=True)
    return replace(row, at_most=1.0 if bars else None)


Figure = Callable[[Size, Path], Iterator["Row | Curve"]]

#: By the name that `--only` takes.
FIGURES: dict[str, Figure] = {
    "kernel": kernel,
    "whole": whole,
    "many": many,
    "memory": memory,
    "jobs": jobs,
    "cluster": cluster,
    "models": models,
    "growth": growth,
}
