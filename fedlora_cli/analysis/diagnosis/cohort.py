"""What only a cohort shows: who holds what, who stands out, who is like whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from fedlora_cli.linalg.spectrum import FloatArray, mean_share
from fedlora_cli.reports.diagnose import (
    AdapterRow,
    ClientFinding,
    CohortFindings,
    HoldingRow,
    Similarity,
)

#: What float16 and bfloat16 rounding do to a copy: to 1 - cosine, and to its singular values as a
#: share of the largest.
_SAME_DIRECTION = 1e-5
_SAME_VALUES = 1e-6

#: A robust z beyond which a client stands out, and the fewest clients of which one can.
OUTLIER = 3.5
_FEWEST = 3

#: The least spread of ln ‖ΔW‖: norms within a tenth of each other are alike.
_LEAST_SPREAD = 0.1

#: The factor that makes a median absolute deviation the standard deviation of a normal variable.
_MAD = 1.4826


@dataclass(frozen=True, eq=False)
class Measured:
    """The singular values of every client, by module, and the products of all clients' updates;
    None where similarity was not asked for.
    """

    spectra: tuple[dict[str, FloatArray], ...]
    products: Products | None


def measure(cohort: Cohort, jobs: int, progress: engine.Progress, *, similar: bool) -> Measured:
    """Read every tensor once, module by module. Raises InputError."""
    spectra: tuple[dict[str, FloatArray], ...] = tuple({} for _ in cohort.clients)
    total: Products | None = None

    adapters = [client.adapter for client in cohort.clients]

    def one_part(names: tuple[str, ...]) -> list[tuple[list[FloatArray | None], Products | None]]:
        found = [_read(one, names) for one in adapters]
        return [one_module([own.pop(name, None) for own in found]) for name in names]

    def one_module(
        factors: list[Factors | None],
    ) -> tuple[list[FloatArray | None], Products | None]:
        if not similar:
            return [None if f is None else lowrank.spectrum(f).numpy() for f in factors], None
        updates = [None if f is None else _svd(f) for f in factors]
        return [None if one is None else one.s.numpy() for one in updates], products(updates)

    work = grouped(adapters, cohort.modules)
    for names, found in zip(work, engine.run(one_part, work, jobs, progress), strict=True):
        for name, (values, alike) in zip(names, found, strict=True):
            for own, s in zip(spectra, values, strict=True):
                if s is not None:
                    own[name] = s
            total = alike if total is None or alike is None else total + alike
    return Measured(spectra, total)


def _read(adapter: Adapter, names: Sequence[str]) -> dict[str, Factors]:
    """The factors that a client has of these modules. Raises InputError where one is at fault for
    its size.
    """
    found = read_modules(adapter, names)
    for (name, _), own in zip(found.items(), sizes([*found.values()]), strict=True):
        error = fault(adapter.path, name, own)
        if error is not None:
            raise error
    return found


def findings(
    plan: Plan, rows: Sequence[AdapterRow], measured: Measured, shared_rank: int
) -> CohortFindings:
    """What the cohort shows. `plan` is raFLoRA's for it, `rows` are its adapters."""
    weights = plan.weights()
    alike = measured.products
    none = np.full(len(rows), np.nan)
    outliers = robust_z(np.array([row.norm for row in rows]))
    cosine = none if alike is None else cosines_to_others(alike.inner, plan.cohort.samples)
    overlap = none if alike is None else _mean_overlap(alike)
    largest = np.max([one.max(axis=1, initial=0.0) for one in weights.values()], axis=0)
    clients = tuple(
        ClientFinding(
            name=row.name,
            outlier=_finite(outliers[k]),
            cosine=_finite(cosine[k]),
            overlap=_finite(overlap[k]),
            max_weight=float(largest[k]),
        )
        for k, row in enumerate(rows)
    )
    return CohortFindings(
        energy_ratio=holders_energy_ratio(rows, shared_rank),
        clients=clients,
        partitions=_holdings(plan, weights, rows),
        similarity=None if alike is None else _similarity(alike),
        copies=copies(
            plan.cohort.names, measured.spectra, None if alike is None else cosines(alike.inner)
        ),
    )


def robust_z(norms: FloatArray) -> FloatArray:
    """(ln x - median) / max(1.4826 MAD, 0.1), not a number where x is zero or with fewer than three
    clients. Shape (K,).

    The floor keeps clients that are all alike from standing out by a hair. Source: Iglewicz and
    Hoaglin, How to Detect and Handle Outliers, 1993.
    """
    logs = np.log(norms, out=np.full(norms.shape, np.nan), where=norms > 0)
    if len(norms) < _FEWEST or np.isnan(logs).all():
        return np.full(norms.shape, np.nan)
    away = logs - np.nanmedian(logs)
    z: FloatArray = away / max(_MAD * float(np.nanmedian(np.abs(away))), _LEAST_SPREAD)
    return z


def holders_energy_ratio(rows: Sequence[AdapterRow], shared_rank: int) -> float | None:
    """ρ of the updates of those clients that hold more than the shared rank, averaged by samples;
    None if there are none, or none with any energy.
    """
    return _mean_share([row for row in rows if row.rank > shared_rank], 0, shared_rank)


def copies(
    names: Sequence[str], spectra: Sequence[Mapping[str, FloatArray]], cosine: FloatArray | None
) -> tuple[tuple[str, str], ...]:
    """Pairs of clients with the same update, in whatever basis or size: all modules as one vector
    point one way. Without cosines, pairs with the same singular values in every module.
    """
    found = []
    for k, own in enumerate(spectra):
        if not any(s.size for s in own.values()):
            continue  # clients without any energy are no copies of each other
        same = (
            j
            for j in range(k)
            if (
                _same_values(spectra[j], own)
                if cosine is None
                else cosine[j, k] > 1 - _SAME_DIRECTION
            )
        )
        original = next(same, None)
        if original is not None:
            found.append((names[original], names[k]))
    return tuple(found)


def _same_values(one: Mapping[str, FloatArray], other: Mapping[str, FloatArray]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [_padded(one[name], other[name]) for name in one]
    return all(bool((np.abs(a - b) <= _SAME_VALUES * a.max(initial=0.0)).all()) for a, b in pairs)


def _padded(one: FloatArray, other: FloatArray) -> list[FloatArray]:
    """Both with zeros at their ends, equally long."""
    length = max(one.size, other.size)
    return [np.pad(s, (0, length - s.size)) for s in (one, other)]


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
            energy=_mean_share(
                [one for one in rows if one.rank >= row.last], row.first - 1, row.last
            ),
            max_weight=row.max_weight,
            heaviest=row.heaviest,
        )
        for row in partitions(plan, weights, plan.cohort.distinct_ranks)
    )


def _mean_share(rows: Sequence[AdapterRow], first: int, last: int) -> float | None:
    samples = [row.samples or 0.0 for row in rows]
    return mean_share([row.energy for row in rows], samples, first, last)


def _mean_overlap(alike: Products) -> FloatArray:
    """By client, the overlap with the others, left and right, over all modules in common."""
    others = 1 - np.eye(len(alike.modules))
    common = (alike.modules * others).sum(axis=1)
    both = ((alike.left + alike.right) / 2 * others).sum(axis=1)
    return _quotient(both, common)


def _similarity(alike: Products) -> Similarity:
    return Similarity(
        cosine=_matrix(cosines(alike.inner)),
        left=_matrix(_quotient(alike.left, alike.modules)),
        right=_matrix(_quotient(alike.right, alike.modules)),
    )


def _quotient(total: FloatArray, number: FloatArray) -> FloatArray:
    """total / number, not a number where there are none."""
    nothing = np.full(total.shape, np.nan)
    mean: FloatArray = np.divide(total, number, out=nothing, where=number > 0)
    return mean


def _matrix(values: FloatArray) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(_finite(value) for value in row) for row in values)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
