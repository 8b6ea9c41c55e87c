"""The singular values of one adapter by module, and the numbers derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_cli.adapters.adapter import Adapter, Module, read_modules
from fedlora_cli.errors import without_norm
from fedlora_cli.linalg import spectrum
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import LARGEST, norm
from fedlora_cli.linalg.spectrum import FloatArray, finite, rank_for_energy
from fedlora_cli.reports.diagnose import AdapterRow, EnergyRow, ModuleSpectrum

#: Share of its module's energy below which a direction is dead: float16 rounds away a thousandth of
#: the norm.
DEAD = 1e-6


def read_finite(adapter: Adapter, names: Sequence[str]) -> dict[str, Factors]:
    """The factors of the adapter's modules in `names`. Raises InputError for an infinite norm."""
    factors = read_modules(adapter, names)
    for name, pair in factors.items():
        if norm(pair) > LARGEST:
            raise without_norm(adapter.path, name)
    return factors


def adapter_row(
    name: str,
    adapter: Adapter,
    spectra: Mapping[str, FloatArray],
    shared_rank: int | None,
    bounds: Sequence[int],
    samples: float | None = None,
    share: float | None = None,
) -> AdapterRow:
    """The report of one adapter, from the singular values of its modules; `bounds` are the upper
    ends of its partitions, ascending.
    """
    modules = tuple(
        _module(module, adapter.modules[module], spectra[module], shared_rank)
        for module in sorted(spectra)
    )
    by_index = spectrum.pooled_energy(list(spectra.values()))
    pooled, total = np.sqrt(by_index), float(by_index.sum())
    return AdapterRow(
        name=name,
        path=str(adapter.path),
        rank=adapter.rank,
        samples=samples,
        share=share,
        energy_ratio=_ratio(list(spectra.values()), shared_rank),
        effective_rank=spectrum.effective_rank(pooled),
        stable_rank=spectrum.stable_rank(pooled),
        rank_90=rank_for_energy(pooled, 0.90),
        rank_95=rank_for_energy(pooled, 0.95),
        rank_99=rank_for_energy(pooled, 0.99),
        dead=sum(row.dead for row in modules),
        directions=sum(row.rank for row in modules),
        norm=float(np.sqrt(total)),
        energy=tuple(float(value) for value in by_index),
        partitions=tuple(
            EnergyRow(first + 1, last, float(by_index[first:last].sum()) / total if total else None)
            for first, last in zip([0, *bounds], bounds, strict=False)
        ),
        modules=modules,
    )


def partition_bounds(rank: int, known: Sequence[int], shared_rank: int | None) -> list[int]:
    """The upper ends of the partitions of an adapter: the `known` ranks of the clients, or else the
    doublings of the shared rank, or else of 1.

    >>> partition_bounds(16, [2, 8], None), partition_bounds(12, [], 3)
    ([2, 8, 16], [3, 6, 12])
    """
    bounds = {bound for bound in known if bound < rank}
    if not known:
        bound = shared_rank or 1
        while bound < rank:
            bounds.add(bound)
            bound *= 2
    if shared_rank is not None and shared_rank < rank:
        bounds.add(shared_rank)
    return [*sorted(bounds), rank]


def _module(name: str, module: Module, s: FloatArray, shared_rank: int | None) -> ModuleSpectrum:
    total = spectrum.energy(s)
    return ModuleSpectrum(
        name=name,
        shape=module.shape,
        rank=module.rank,
        energy_ratio=_ratio([s], shared_rank),
        effective_rank=spectrum.effective_rank(s),
        stable_rank=spectrum.stable_rank(s),
        rank_90=rank_for_energy(s, 0.90),
        rank_95=rank_for_energy(s, 0.95),
        rank_99=rank_for_energy(s, 0.99),
        dead=module.rank - int((np.square(s) >= DEAD * total).sum()) if total else module.rank,
        norm=float(np.sqrt(total)),
        singular_values=tuple(float(value) for value in s),
    )


def _ratio(spectra: Sequence[FloatArray], shared_rank: int | None) -> float | None:
    return None if shared_rank is None else finite(spectrum.energy_ratio(spectra, shared_rank))
