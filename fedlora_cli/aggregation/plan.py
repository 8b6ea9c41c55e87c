"""The plan of an aggregation, made from headers alone; it finds every contradiction."""

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
from fedlora_cli.methods.method import AVERAGES, Method
from fedlora_cli.methods.weights import FloatArray, Holdings, Rule, Weights, capped
from fedlora_cli.text import shortened


@dataclass(frozen=True, eq=False)
class Plan:
    """An aggregation, ready to run. `rank` is None until `--energy` has chosen it.

    If the clients were compared beforehand, `norms` (K,) are their ‖ΔW_k‖_F over all modules,
    `clip` (K,) the factors of their updates, `trust` (K,) the factors of their samples.
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
        """The plan for these modules and full tensors, small enough to be sent to a worker.

        Clients, samples, rank, scale, dtype, norms, clip and trust stay those of the whole cohort.
        Properties that `cohort` derives from modules, such as `distinct_ranks`, are of the subset.
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
        """n_k times the trust, shape (K,)."""
        return self.cohort.samples * (1.0 if self.trust is None else self.trust)

    def clipped(self, k: int) -> float:
        """The factor of client k's update."""
        return 1.0 if self.clip is None else float(self.clip[k])

    @property
    def adapters(self) -> list[Adapter]:
        """The clients' adapters in their order, then those of earlier rounds."""
        earlier = (self.previous, self.before_previous)
        clients = (client.adapter for client in self.cohort.clients)
        return [*clients, *(one for one in earlier if one is not None)]

    def holdings(self, module: str, norms: FloatArray) -> Holdings:
        """The ranks, samples and norms of the clients in a module.

        A client that does not adapt the module has no samples in it; with `--missing zero`, it
        counts as a zero update.
        """
        ranks = self.cohort.ranks(module)
        samples = self.samples
        if self.options.missing == "renormalize":
            samples = np.where(ranks > 0, samples, 0.0)
        return Holdings(ranks, samples, norms, self.previous_rank(module))

    def starts(self, module: str) -> tuple[int, ...]:
        """The rank indices at which weights in a module may change, ascending from 0.

        Parts of clients in SVD order are orthogonal and are not separated.
        """
        by_index = not self.method.basis_free or self.options.max_weight is not None
        if not by_index or self.options.basis == "svd":
            return (0,)
        return tuple(sorted({0, *self.cohort.ranks(module).tolist()}))

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module."""
        return self._first(module).shape

    def layout(self, module: str) -> FactorLayout:
        """The output's layout of a module's factors: never transposed."""
        return replace(self._first(module).layout, turned=False)

    def _first(self, module: str) -> Module:
        return next(one.modules[module] for one in self.adapters if module in one.modules)

    def weights(self) -> dict[str, FloatArray]:
        """The clients' weights (K, R) by module.

        NaN if the rule needs norms, or before a robust rule has compared the updates.
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
        previous = self.previous.modules.get(module)
        return 0 if previous is None else previous.rank


@dataclass(frozen=True)
class PlanParts:
    """A plan in parts: for each group of names, the plan's subset and the names."""

    plan: Plan
    groups: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[tuple[Plan, Sequence[str]]]:
        # One by one: with a thousand clients, all parts together would be large.
        return ((self.plan.subset(names), names) for names in self.groups)


def make_plan(
    cohort: Cohort,
    options: AggregateOptions,
    previous: Adapter | None = None,
    before_previous: Adapter | None = None,
) -> Plan:
    """The plan for these clients and options. Raises UsageError and InputError."""
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
        # A common scaling is kept, so that training continues unchanged.
        scale=cohort.common_scale or 1.0,
        dtype=options.dtype or cohort.dtype,
        warnings=(
            *([f"{method.name} does not use the previous adapter"] if unused else []),
            *([_DORA] if cohort.metadata.dora else []),
            *([] if options.dtype else _other_dtypes(cohort)),
        ),
    )


def _other_dtypes(cohort: Cohort) -> Iterator[str]:
    """A warning for every dtype of clients other than the output's."""
    others: dict[str, list[str]] = {}
    for client in cohort.clients:
        if client.adapter.dtype != cohort.dtype:
            others.setdefault(client.adapter.dtype, []).append(client.name)
    for dtype, names in sorted(others.items()):
        yield (
            f"{shortened(names)} sent {dtype}; the global adapter is {cohort.dtype}, the dtype of "
            "most samples; --dtype sets another"
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
    # In a folder of rounds, a first round is known to have no earlier adapter.
    unknown = options.rounds is None and (previous is None or before is None)
    if options.momentum and unknown:
        found = f"{options.momentum} without two earlier global adapters"
        cure = "give --rounds, or --previous and --before-previous"
        raise UsageError("--momentum", found, cure)
    if before is not None and not options.momentum:
        raise UsageError("--before-previous", "given without --momentum", "give both or neither")
    if options.basis == "svd" and method.merge in AVERAGES:
        found = f"{method.name} averages factors, which would lose what their bases have in common"
        raise UsageError("--basis", found, "choose raflora, residual, flexlora or flora")
    if method.compress == "none":
        for flag, value in (("--momentum", options.momentum or None), ("--energy", options.energy)):
            if value is not None:
                found = f"{method.name} does not truncate its sum to a rank"
                raise UsageError(flag, found, "choose raflora, residual or flexlora")


def _check_robust(cohort: Cohort, options: AggregateOptions, method: Method) -> None:
    """Raise UsageError if the robust rule cannot be used with these clients."""
    robust, f = options.robust, options.attackers or 0
    if robust is None:
        return
    if method.merge in AVERAGES:
        found = f"{method.name} averages factors, not updates"
        raise UsageError("--robust", found, "choose raflora, residual, flexlora or flora")
    clients = len(cohort.clients)
    if robust == "multi-krum" and clients < 2 * f + 3:
        found = f"{f} of {clients} clients; Multi-Krum needs 2 f + 3 for f attackers"
        raise UsageError("--attackers", found, f"give at most {max(0, (clients - 3) // 2)}")


def _rule(method: Method, options: AggregateOptions) -> Rule:
    """The method's rule with `--quorum` and `--max-weight`."""
    rule = method.rule if options.quorum is None else _quorum_rule(method, options.quorum)
    return rule if options.max_weight is None else partial(_limited, rule, options.max_weight)


def _limited(rule: Rule, limit: float, holdings: Holdings) -> Weights:
    weights = rule(holdings)
    # Weights that depend on norms are unknown from headers alone.
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
    """The uniform rank of the output: `--rank`, or the largest of the adapters."""
    if options.energy is not None:
        return None
    adapters = [*(client.adapter for client in cohort.clients), *earlier]
    if method.compress != "none":
        # The absence of a high-rank client in this round must not shrink the global adapter.
        natural = max(adapter.rank for adapter in adapters)
    else:
        previous = max((one.rank for one in earlier), default=0)
        ranks = [cohort.ranks(module) for module in cohort.modules]
        whole = method.merge == "sum"
        natural = max(int(each.sum() if whole else each.max()) for each in ranks) + previous
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
