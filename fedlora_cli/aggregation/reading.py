"""The factors of modules, read from the clients and from earlier global adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from fedlora_cli.adapters.adapter import Adapter, read_modules
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import Sizes, fault, norm, sizes
from fedlora_cli.methods.weights import FloatArray


@dataclass(frozen=True, eq=False)
class ModuleTerms:
    """One module's factors, of the clients that adapt it and of earlier global adapters.

    - `clients`: the number of clients in the cohort; `holders`: the positions in the cohort of the
      clients that adapt the module.
    - `factors` and `sizes` by holder; sizes are within 1 %, and none is a fault.
    - `previous` is in SVD order, so that its rank indices match those of the clients.
    """

    name: str
    clients: int
    holders: tuple[int, ...]
    factors: tuple[Factors, ...]
    sizes: tuple[Sizes, ...]
    previous: Factors | None
    before_previous: Factors | None

    def by_holder(self) -> Iterator[tuple[int, Factors, Sizes]]:
        """Holder, factors and sizes, client by client."""
        return zip(self.holders, self.factors, self.sizes, strict=True)

    @cached_property
    def norms(self) -> FloatArray:
        """‖ΔW_k‖_F, shape (K,), 0 for clients that do not adapt the module."""
        norms = np.zeros(self.clients)
        norms[list(self.holders)] = [norm(factors) for factors in self.factors]
        return norms


def read_terms(plan: Plan, names: Sequence[str]) -> list[ModuleTerms]:
    """The factors of these modules; neighbors in a file are read together. Raises InputError."""
    clients = [client_factors(plan, k, names) for k in range(len(plan.cohort.clients))]
    return [_with_clients(plan, earlier, clients) for earlier in read_earlier(plan, names)]


def read_earlier(plan: Plan, names: Sequence[str]) -> list[ModuleTerms]:
    """The factors of earlier global adapters alone. Raises InputError."""
    previous, before = (
        {} if adapter is None else _factors(plan, adapter, names)
        for adapter in (plan.previous, plan.before_previous)
    )
    return [
        ModuleTerms(
            name=name,
            clients=len(plan.cohort.clients),
            holders=(),
            factors=(),
            sizes=(),
            previous=lowrank.canonical(previous[name]) if name in previous else None,
            before_previous=before.get(name),
        )
        for name in names
    ]


def read_clients(plan: Plan, name: str) -> Iterator[tuple[int, Factors, Sizes]]:
    """Holder, factors and sizes of one module, client by client. Raises InputError."""
    for k, client in enumerate(plan.cohort.clients):
        if name in client.adapter.modules:
            factors = client_factors(plan, k, [name])[name]
            [measured] = checked(plan, name, [k], [factors], torch.float32)
            yield k, _ordered(plan, factors), measured


def _with_clients(
    plan: Plan, earlier: ModuleTerms, clients: Sequence[dict[str, Factors]]
) -> ModuleTerms:
    """The module with the clients' factors, popped from `clients` to free memory early."""
    holders = tuple(k for k, modules in enumerate(clients) if earlier.name in modules)
    factors = [clients[k].pop(earlier.name) for k in holders]
    measured = checked(plan, earlier.name, holders, factors, torch.float32)
    for position, unordered in enumerate(factors):  # in place: one copy of each at a time
        factors[position] = _ordered(plan, unordered)
    return replace(earlier, holders=holders, factors=tuple(factors), sizes=tuple(measured))


def checked(
    plan: Plan,
    name: str,
    holders: Sequence[int],
    factors: Sequence[Factors],
    precision: torch.dtype,
) -> list[Sizes]:
    """The sizes of these clients' updates of one module. Raises InputError if one is a fault.

    Parts begin where the clients' weights may change; `precision` is that of `sizes`.
    """
    measured = sizes(factors, plan.starts(name), precision)
    for k, update in zip(holders, measured, strict=True):
        error = fault(plan.cohort.clients[k].adapter.path, name, update)
        if error is not None:
            raise error
    return measured


def client_factors(plan: Plan, k: int, names: Sequence[str]) -> dict[str, Factors]:
    """Client k's clipped factors of the modules that it adapts. Raises InputError."""
    clip = plan.clipped(k)
    modules = _factors(plan, plan.cohort.clients[k].adapter, names)
    return {name: replace(one, scale=one.scale * clip) for name, one in modules.items()}


def _ordered(plan: Plan, factors: Factors) -> Factors:
    """A client's update in the basis of `--basis`."""
    return lowrank.canonical(factors) if plan.options.basis == "svd" else factors


def _factors(plan: Plan, adapter: Adapter, names: Sequence[str]) -> dict[str, Factors]:
    """The adapter's factors of those modules that it adapts, on the device of the options."""
    device = plan.options.device
    return {
        name: replace(factors, B=factors.B.to(device), A=factors.A.to(device))
        for name, factors in read_modules(adapter, names).items()
    }
