"""The factors of some modules, of all clients and of earlier global adapters."""

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
    """One module's factors of the clients that adapt it, and of earlier global adapters.

    `holders` are the clients' positions in the cohort of `clients` clients. `previous` is in SVD
    order, so that its index i means what the clients' does. None of it depends on a method.
    `sizes` are those of the clients' updates, within 1 %; no update is at fault for its size.
    """

    name: str
    clients: int
    holders: tuple[int, ...]
    factors: tuple[Factors, ...]
    sizes: tuple[Sizes, ...]
    previous: Factors | None
    before_previous: Factors | None

    @cached_property
    def norms(self) -> FloatArray:
        """‖ΔW_k‖_F, shape (K,), 0 for clients that do not adapt the module."""
        norms = np.zeros(self.clients)
        norms[list(self.holders)] = [norm(one) for one in self.factors]
        return norms


def read_terms(plan: Plan, names: Sequence[str]) -> list[ModuleTerms]:
    """The factors of these modules. What lies side by side in a file is read as one range.

    Raises InputError.
    """
    clients = [_factors(plan, one.adapter, names) for one in plan.cohort.clients]
    return [_with_clients(plan, earlier, clients) for earlier in read_earlier(plan, names)]


def read_earlier(plan: Plan, names: Sequence[str]) -> list[ModuleTerms]:
    """The same without the clients. Raises InputError."""
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
    """The factors of one module and their sizes, client by client: holders, in their order.

    Raises InputError.
    """
    for k, client in enumerate(plan.cohort.clients):
        if name in client.adapter.modules:
            factors = _clipped(plan, k, _factors(plan, client.adapter, [name])[name])
            [found] = checked(plan, name, [k], [factors], torch.float32)
            yield k, _ordered(plan, factors), found


def _with_clients(
    plan: Plan, earlier: ModuleTerms, clients: Sequence[dict[str, Factors]]
) -> ModuleTerms:
    """That module with the clients' factors, which are taken out, so that nobody else has them."""
    holders = tuple(k for k, own in enumerate(clients) if earlier.name in own)
    factors = [_clipped(plan, k, clients[k].pop(earlier.name)) for k in holders]
    found = checked(plan, earlier.name, holders, factors, torch.float32)
    for position, one in enumerate(factors):
        factors[position] = _ordered(plan, one)
    return replace(earlier, holders=holders, factors=tuple(factors), sizes=tuple(found))


def checked(
    plan: Plan,
    name: str,
    holders: Sequence[int],
    factors: Sequence[Factors],
    precision: torch.dtype,
) -> list[Sizes]:
    """The sizes of these clients' updates of one module, in parts as the clients' weights may
    differ by rank index; `precision` as in `sizes`. Raises InputError where one is at fault.
    """
    found = sizes(factors, plan.starts(name), precision)
    for k, one in zip(holders, found, strict=True):
        error = fault(plan.cohort.clients[k].adapter.path, name, one)
        if error is not None:
            raise error
    return found


def client_factors(plan: Plan, k: int, names: Sequence[str]) -> dict[str, Factors]:
    """Those of the modules that client k has, clipped. Raises InputError."""
    found = _factors(plan, plan.cohort.clients[k].adapter, names)
    return {name: _clipped(plan, k, one) for name, one in found.items()}


def _ordered(plan: Plan, factors: Factors) -> Factors:
    """A client's update in the basis that the options ask for."""
    return lowrank.canonical(factors) if plan.options.basis == "svd" else factors


def _clipped(plan: Plan, k: int, factors: Factors) -> Factors:
    return replace(factors, scale=factors.scale * plan.clipped(k))


def _factors(plan: Plan, adapter: Adapter, names: Sequence[str]) -> dict[str, Factors]:
    """The factors that an adapter has of these modules, on the device to compute on."""
    device = plan.options.device
    found = read_modules(adapter, names)
    return {
        name: replace(one, B=one.B.to(device), A=one.A.to(device)) for name, one in found.items()
    }
