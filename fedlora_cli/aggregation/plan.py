"""What will be computed, decided from headers alone; every contradiction is found here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fedlora_cli.adapters.adapter import Adapter, FactorLayout, Module
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.clients.cohort import Cohort, with_earlier
from fedlora_cli.errors import FaultHandler, InputError, UsageError, raise_fault
from fedlora_cli.methods import find
from fedlora_cli.methods.method import Method
from fedlora_cli.methods.weights import FloatArray, Holdings, Rule, Weights, capped
from fedlora_cli.text import shortened


@dataclass(frozen=True, eq=False)
class Plan:
    """One aggregation, ready to run. `rank` is None while `--energy` has still to decide it.

    Where updates were looked at beforehand, `norms` (K,) are the clients' ‖ΔW_k‖_F over all
    modules, `clip` (K,) what each is multiplied by, `trust` (K,) what its samples are.
    """

    cohort: Cohort
    options: AggregateOptions
    method: Method
    rule: Rule
    previous: Adapter | None
    before_previous: Adapter | None
    modules: tuple[str, ...]
    rank: int | None
    scale: float
    dtype: str
    warnings: tuple[str, ...]
    norms: FloatArray | None = None
    clip: FloatArray | None = None
    trust: FloatArray | None = None

    def subset(self, names: Collection[str]) -> Plan:
        """The plan as far as these modules and full tensors go, small enough to be sent with them.

        What was found of the whole cohort stands in it: all clients with their samples, the rank,
        the scale, the dtype, norms, clip and trust. What `cohort` derives from the modules of its
        clients, as `distinct_ranks`, is that of these modules.
        """
        cohort = self.cohort.subset(names)
        previous, before = (
            None if one is None else one.subset(names)
            for one in (self.previous, self.before_previous)
        )
        return replace(
            self,
            cohort=cohort,
            previous=previous,
            before_previous=before,
            modules=_modules(cohort, [one for one in (previous, before) if one is not None]),
            warnings=(),
        )

    @property
    def samples(self) -> FloatArray:
        """n_k as they count, shape (K,)."""
        return self.cohort.samples * (1.0 if self.trust is None else self.trust)

    def clipped(self, k: int) -> float:
        """What client k's update is multiplied by."""
        return 1.0 if self.clip is None else float(self.clip[k])

    @property
    def adapters(self) -> list[Adapter]:
        """All that are read: the clients', in their order, and those of earlier rounds."""
        earlier = (self.previous, self.before_previous)
        clients = (client.adapter for client in self.cohort.clients)
        return [*clients, *(one for one in earlier if one is not None)]

    def holdings(self, module: str, norms: FloatArray) -> Holdings:
        """Who holds what in one module. A client that does not adapt it takes its samples with it,
        unless `--missing zero` lets it count as a zero update.
        """
        ranks = self.cohort.ranks(module)
        samples = self.samples
        if self.options.missing == "renormalize":
            samples = np.where(ranks > 0, samples, 0.0)
        return Holdings(ranks, samples, norms, self.previous_rank(module))

    def starts(self, module: str) -> tuple[int, ...]:
        """The rank indices from which on a client's weight in a module may be another, ascending
        from 0. Clients in SVD order have parts that are orthogonal, which need no look.
        """
        by_index = not self.method.basis_free or self.options.max_weight is not None
        if not by_index or self.options.basis == "svd":
            return (0,)
        return tuple(sorted({0, *self.cohort.ranks(module).tolist()}))

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module."""
        return self._first(module).shape

    def layout(self, module: str) -> FactorLayout:
        """How the output holds the factors of a module: never turned."""
        return replace(self._first(module).layout, turned=False)

    def _first(self, module: str) -> Module:
        return next(one.modules[module] for one in self.adapters if module in one.modules)

    def weights(self) -> dict[str, FloatArray]:
        """The clients' weights (K, R) by module as far as headers tell: not a number where the rule
        needs the norms of the updates, or a robust rule has still to look at them.
        """
        unknown = np.full(len(self.cohort.clients), np.nan)
        known = 1.0 if self.options.robust is None or self.trust is not None else np.nan
        return {
            name: known * self.rule(self.holdings(name, unknown)).clients for name in self.modules
        }

    def previous_rank(self, module: str) -> int:
        """The previous adapter's rank in a module, for methods that use it."""
        if self.previous is None or not self.method.uses_previous:
            return 0
        found = self.previous.modules.get(module)
        return 0 if found is None else found.rank


@dataclass(frozen=True)
class PlanParts:
    """A plan in parts: for each group of names the plan as far as they go, and they themselves."""

    plan: Plan
    groups: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[tuple[Plan, Sequence[str]]]:
        # One at a time: of a thousand clients, all parts together would be large.
        return ((self.plan.subset(names), names) for names in self.groups)


def make_plan(
    cohort: Cohort,
    options: AggregateOptions,
    previous: Adapter | None = None,
    before_previous: Adapter | None = None,
) -> Plan:
    """The plan for these clients and choices. Raises UsageError and InputError."""
    method = find(options.method)
    _check_choices(method, options, previous, before_previous)
    check_ranks(cohort, options.max_rank, raise_fault)
    _check_robust(cohort, options, method)
    given = [adapter for adapter in (previous, before_previous) if adapter is not None]
    cohort, given = with_earlier(cohort, given, base_declared=options.base is not None)
    uses_previous = method.uses_previous or options.momentum > 0
    earlier = given if uses_previous else []
    oriented = iter(given)
    previous, before_previous = (
        None if one is None else next(oriented) for one in (previous, before_previous)
    )
    unused = previous is not None and options.rounds is None and not uses_previous
    return Plan(
        cohort=cohort,
        options=options,
        method=method,
        rule=_rule(method, options),
        previous=previous if uses_previous else None,
        before_previous=before_previous,
        modules=_modules(cohort, earlier),
        rank=_output_rank(cohort, options, method, earlier),
        # One scaling for all clients is kept, so that training goes on as before.
        scale=cohort.common_scale or 1.0,
        dtype=options.dtype or cohort.dtype,
        warnings=(
            *([f"{method.name} does not use the previous adapter"] if unused else []),
            *([_DORA] if cohort.facts.dora else []),
            *([] if options.dtype else _other_dtypes(cohort)),
        ),
    )


def _other_dtypes(cohort: Cohort) -> Iterator[str]:
    """A warning for every dtype of clients that is not the output's."""
    others: dict[str, list[str]] = {}
    for client in cohort.clients:
        if client.adapter.dtype != cohort.dtype:
            others.setdefault(client.adapter.dtype, []).append(client.name)
    for dtype, names in sorted(others.items()):
        yield (
            f"{shortened(names)} sent {dtype}; the global adapter is {cohort.dtype}, by most of "
            "the samples; --dtype sets another"
        )


def _modules(cohort: Cohort, earlier: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(sorted({*cohort.modules, *(name for one in earlier for name in one.modules)}))


_DORA = (
    "DoRA: directions and magnitudes are averaged apart, which is not the average of the weights "
    "that the clients trained"
)


def _check_choices(
    method: Method, options: AggregateOptions, previous: Adapter | None, before: Adapter | None
) -> None:
    # In a folder of rounds, what came before the first is known: nothing.
    unknown = options.rounds is None and (previous is None or before is None)
    if options.momentum and unknown:
        found = f"{options.momentum} without two earlier global adapters"
        cure = "give --rounds, or --previous and --before-previous"
        raise UsageError("--momentum", found, cure)
    if before is not None and not options.momentum:
        raise UsageError("--before-previous", "given without --momentum", "give both or neither")
    if options.basis == "svd" and method.merge != "sum":
        found = f"{method.name} averages factors, which would lose what their bases have in common"
        raise UsageError("--basis", found, "choose raflora, residual, flexlora or flora")
    if method.compress == "none":
        for flag, value in (("--momentum", options.momentum or None), ("--energy", options.energy)):
            if value is not None:
                found = f"{method.name} does not truncate its sum to a rank"
                raise UsageError(flag, found, "choose raflora, residual or flexlora")


def _check_robust(cohort: Cohort, options: AggregateOptions, method: Method) -> None:
    """Whether the robust rule can judge these clients."""
    robust, f = options.robust, options.attackers or 0
    if robust is None:
        return
    if method.merge != "sum":
        found = f"{method.name} averages factors, not updates"
        raise UsageError("--robust", found, "choose raflora, residual, flexlora or flora")
    clients = len(cohort.clients)
    if robust == "multi-krum" and clients < 2 * f + 3:
        found = f"{f} of {clients} clients; Multi-Krum needs 2 f + 3 for f attackers"
        raise UsageError("--attackers", found, f"give at most {max(0, (clients - 3) // 2)}")


def _rule(method: Method, options: AggregateOptions) -> Rule:
    """The method's rule, with the quorum asked for, and under the largest weight allowed."""
    rule = method.rule if options.quorum is None else _quorum_rule(method, options.quorum)
    return rule if options.max_weight is None else partial(_limited, rule, options.max_weight)


def _limited(rule: Rule, limit: float, holdings: Holdings) -> Weights:
    weights = rule(holdings)
    # Headers alone do not tell what depends on norms.
    known = not np.isnan(weights.clients).any()
    return capped(weights, limit, holdings.previous_rank) if known else weights


def _quorum_rule(method: Method, quorum: float) -> Rule:
    if method.with_quorum is None:
        found = f"the rule of {method.name} has no quorum"
        raise UsageError("--quorum", found, "choose raflora; quorum 1 is the residual form")
    return method.with_quorum(quorum)


def check_ranks(cohort: Cohort, most: int | None, on_fault: FaultHandler) -> None:
    """Report each client whose rank is above `most` to `on_fault`; None is no limit."""
    for client in cohort.clients:
        rank = client.adapter.rank
        if most is not None and rank > most:
            found = f"rank {rank}, above --max-rank {most}"
            cure = "leave the client out or raise the limit"
            on_fault(InputError(client.adapter.path, found, cure))


def _output_rank(
    cohort: Cohort, options: AggregateOptions, method: Method, earlier: Sequence[Adapter]
) -> int | None:
    """The uniform rank of the output: asked for, or the largest that occurs."""
    if options.energy is not None:
        return None
    adapters = [*(client.adapter for client in cohort.clients), *earlier]
    if method.compress == "svd":
        # A high-rank client that is absent this round must not shrink what the last round had.
        natural = max(adapter.rank for adapter in adapters)
    elif method.merge == "sum":
        natural = max(int(cohort.ranks(module).sum()) for module in cohort.modules)
    else:
        natural = cohort.rank
    if options.rank is None:
        return natural
    if method.compress == "none" and options.rank < natural:
        found = f"{options.rank}, but {method.name} does not truncate its rank {natural}"
        raise UsageError("--rank", found, "choose raflora, residual or flexlora")
    sides = [min(module.shape) for adapter in adapters for module in adapter.modules.values()]
    largest = max(natural, *sides)
    if options.rank > largest:
        found = f"{options.rank}, where no module has more than {largest} directions"
        raise UsageError("--rank", found, "give a smaller one")
    return options.rank
