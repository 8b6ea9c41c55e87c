"""Findings about a cohort: the holders of each rank partition, outliers, and similar clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedlora_cli.adapters.adapter import Adapter, read_modules
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.aggregation.influence import partitions
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.analysis.diagnosis.similarity import Products, cosines, cosines_to_others, products
from fedlora_cli.clients.cohort import Cohort
from fedlora_cli.execution import engine
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import fault, sizes
from fedlora_cli.linalg.spectrum import FloatArray, finite, mean_share
from fedlora_cli.reports.diagnose import (
    AdapterRow,
    ClientFinding,
    CohortFindings,
    HoldingRow,
    Similarity,
)

#: The effect of float16 and bfloat16 rounding on a copy: on 1 - cosine, and on its singular values
#: relative to the largest.
_SAME_DIRECTION = 1e-5
_SAME_VALUES = 1e-6

#: The robust z beyond which a client is an outlier, and the fewest clients for a z.
OUTLIER = 3.5
_FEWEST = 3

#: The least spread of ln ‖ΔW‖, so that norms within a tenth of each other are no outliers.
_LEAST_SPREAD = 0.1

#: Median absolute deviation to standard deviation, for a normal distribution.
_MAD = 1.4826


def measure(
    cohort: Cohort, jobs: int, progress: engine.Progress, *, similar: bool
) -> tuple[list[dict[str, FloatArray]], Products | None]:
    """The singular values by client and module, and, if `similar`, the products of the clients'
    updates; every tensor is read once. Raises InputError.
    """
    spectra: list[dict[str, FloatArray]] = [{} for _ in cohort.clients]
    total: Products | None = None
    adapters = [client.adapter for client in cohort.clients]

    def one_part(names: tuple[str, ...]) -> list[tuple[list[FloatArray | None], Products | None]]:
        clients = [_read(adapter, names) for adapter in adapters]
        return [one_module([factors.pop(name, None) for factors in clients]) for name in names]

    def one_module(
        factors: list[Factors | None],
    ) -> tuple[list[FloatArray | None], Products | None]:
        if not similar:
            return [None if f is None else lowrank.spectrum(f).numpy() for f in factors], None
        updates = [None if f is None else _svd(f) for f in factors]
        return [None if u is None else u.s.numpy() for u in updates], products(updates)

    work = grouped(adapters, cohort.modules)
    for names, modules in zip(work, engine.run(one_part, work, jobs, progress), strict=True):
        for name, (values, sums) in zip(names, modules, strict=True):
            for by_module, s in zip(spectra, values, strict=True):
                if s is not None:
                    by_module[name] = s
            total = sums if total is None or sums is None else total.plus(sums)
    return spectra, total


def _read(adapter: Adapter, names: Sequence[str]) -> dict[str, Factors]:
    """The factors of the adapter's modules among `names`. Raises InputError for a faulty size."""
    factors = read_modules(adapter, names)
    for name, size in zip(factors, sizes([*factors.values()]), strict=True):
        error = fault(adapter.path, name, size)
        if error is not None:
            raise error
    return factors


def findings(
    plan: Plan,
    rows: Sequence[AdapterRow],
    spectra: Sequence[Mapping[str, FloatArray]],
    alike: Products | None,
    shared_rank: int,
) -> CohortFindings:
    """The findings about a cohort. `plan` is the plan of raFLoRA, `rows` are the adapters; the rest
    comes from `measure`.
    """
    weights = plan.weights()
    outliers = robust_z(np.array([row.norm for row in rows]))
    cosine = overlap = np.full(len(rows), np.nan)
    similarity = pairwise = None
    if alike is not None:
        cosine = cosines_to_others(alike.inner, plan.cohort.samples)
        overlap = _mean_overlap(alike)
        pairwise = cosines(alike.inner)
        left, right = (_quotient(side, alike.modules) for side in (alike.left, alike.right))
        similarity = Similarity(_matrix(pairwise), _matrix(left), _matrix(right))
    largest = np.max([w.max(axis=1, initial=0.0) for w in weights.values()], axis=0)
    clients = tuple(
        ClientFinding(
            name=row.name,
            outlier=finite(outliers[k]),
            cosine=finite(cosine[k]),
            overlap=finite(overlap[k]),
            max_weight=float(largest[k]),
        )
        for k, row in enumerate(rows)
    )
    return CohortFindings(
        energy_ratio=_mean_share([row for row in rows if row.rank > shared_rank], 0, shared_rank),
        clients=clients,
        partitions=_holdings(plan, weights, rows),
        similarity=similarity,
        copies=copies(plan.cohort.names, spectra, pairwise),
    )


def robust_z(norms: FloatArray) -> FloatArray:
    """(ln x - median) / max(1.4826 MAD, 0.1) by client, shape (K,). NaN for x = 0, and for all
    clients if there are fewer than three.

    The floor of 0.1 avoids outliers among nearly equal norms. Source: Iglewicz and Hoaglin, How to
    Detect and Handle Outliers, 1993.
    """
    logs = np.log(norms, out=np.full(norms.shape, np.nan), where=norms > 0)
    if len(norms) < _FEWEST or np.isnan(logs).all():
        return np.full(norms.shape, np.nan)
    away = logs - np.nanmedian(logs)
    z: FloatArray = away / max(_MAD * float(np.nanmedian(np.abs(away))), _LEAST_SPREAD)
    return z


def copies(
    names: Sequence[str], spectra: Sequence[Mapping[str, FloatArray]], cosine: FloatArray | None
) -> tuple[tuple[str, str], ...]:
    """Pairs of clients with the same update up to its basis and its size: a cosine of 1 over all
    modules. Without cosines, pairs with the same singular values in every module.
    """

    def same(j: int, k: int) -> bool:
        if cosine is None:
            return _same_values(spectra[j], spectra[k])
        return bool(cosine[j, k] > 1 - _SAME_DIRECTION)

    pairs = []
    for k, values in enumerate(spectra):
        if any(s.size for s in values.values()):  # clients without energy are not copies
            original = next((j for j in range(k) if same(j, k)), None)
            if original is not None:
                pairs.append((names[original], names[k]))
    return tuple(pairs)


def _same_values(left: Mapping[str, FloatArray], right: Mapping[str, FloatArray]) -> bool:
    def close(a: FloatArray, b: FloatArray) -> bool:
        length = max(a.size, b.size)
        a, b = (np.pad(s, (0, length - s.size)) for s in (a, b))
        return np.allclose(a, b, rtol=0, atol=_SAME_VALUES * a.max(initial=0.0))

    return left.keys() == right.keys() and all(close(left[name], right[name]) for name in left)


def _svd(factors: Factors) -> lowrank.Svd:
    ones = torch.ones(factors.rank, dtype=torch.float64)
    return lowrank.svd(lowrank.orthogonalize([factors]), ones)[0]


def _holdings(
    plan: Plan, weights: Mapping[str, FloatArray], rows: Sequence[AdapterRow]
) -> tuple[HoldingRow, ...]:
    return tuple(
        HoldingRow(
            first=row.first,
            last=row.last,
            holders=row.holders,
            coverage=row.coverage,
            energy=_mean_share([r for r in rows if r.rank >= row.last], row.first - 1, row.last),
            max_weight=row.max_weight,
            heaviest=row.heaviest,
        )
        for row in partitions(plan, weights, plan.cohort.distinct_ranks)
    )


def _mean_share(rows: Sequence[AdapterRow], first: int, last: int) -> float | None:
    samples = [row.samples or 0.0 for row in rows]
    return mean_share([row.energy for row in rows], samples, first, last)


def _mean_overlap(alike: Products) -> FloatArray:
    """The mean overlap of each client with the others, left and right, over common modules."""
    others = 1 - np.eye(len(alike.modules))
    common = (alike.modules * others).sum(axis=1)
    both = ((alike.left + alike.right) / 2 * others).sum(axis=1)
    return _quotient(both, common)


def _quotient(total: FloatArray, number: FloatArray) -> FloatArray:
    """total / number, NaN for a number of 0."""
    nan = np.full(total.shape, np.nan)
    mean: FloatArray = np.divide(total, number, out=nan, where=number > 0)
    return mean


def _matrix(values: FloatArray) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(map(finite, row)) for row in values)
