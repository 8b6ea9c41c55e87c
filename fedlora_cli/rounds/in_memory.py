"""Aggregation in memory: state dicts in, one state dict out, with the checks of folders.

>>> import torch
>>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"]}
>>> pair = {"base_model.model.q.lora_A.weight": torch.ones(1, 3)}
>>> ann = StateDict(pair | {"base_model.model.q.lora_B.weight": torch.ones(2, 1)}, config, 30)
>>> bob = StateDict(pair | {"base_model.model.q.lora_B.weight": torch.zeros(2, 1)}, config, 10)
>>> merged, report = aggregate_state_dicts({"ann": ann, "bob": bob})
>>> A, B = (merged.tensors[f"base_model.model.q.lora_{side}.weight"] for side in "AB")
>>> (merged.scaling * B @ A).round().int().tolist()  # 3/4 of ann's update
[[2, 2, 2], [2, 2, 2]]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import overload

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.clients.reading import LeftOut
from fedlora_cli.errors import FedloraError, InputError, UsageError, in_python
from fedlora_cli.files.locations import location
from fedlora_cli.files.memory import Folders
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.rounds.aggregate import aggregate
from fedlora_cli.rounds.distribute import distribute, recipient_of_rank
from fedlora_cli.rounds.distribution import check_room, claimed_folder, hand_out
from fedlora_cli.rounds.initialize import initialize
from fedlora_cli.rounds.options import DistributeOptions, InitOptions
from fedlora_cli.rounds.state_dict import StateDict, checked_name, put
from fedlora_cli.text import printable
from fedlora_cli.version import __version__


def aggregate_state_dicts(
    clients: Mapping[str, StateDict],
    options: AggregateOptions | None = None,
    *,
    previous: StateDict | None = None,
    before_previous: StateDict | None = None,
    output: Location | str | None = None,
) -> tuple[StateDict, AggregateReport]:
    """The global adapter of the clients' adapters, by name, and the report.

    The checks and the bytes are those of `aggregate` on folders. `previous` and `before_previous`
    are the global adapters of the last two rounds. With `output`, that folder is written as by
    `aggregate`. Raises UsageError, InputError, OutputError and VerificationError.
    """
    options = AggregateOptions() if options is None else options
    store = Folders()
    with _in_python():
        if not clients:
            raise UsageError("clients", "an empty mapping", "give at least one client")
        if options.dry_run:
            raise UsageError("--dry-run", "given for adapters in memory", "leave it out")
        refused = _put_clients(store, clients, skip=options.on_bad_client == "skip")
        if previous is not None:
            put(store, "previous", replace(previous, samples=None))
            options = replace(options, previous=store.place("previous"))
        if before_previous is not None:
            put(store, "before_previous", replace(before_previous, samples=None))
            options = replace(options, before_previous=store.place("before_previous"))
        target = store.place("result") if output is None else location(output)
        report = aggregate(store.place("clients"), target, options)
        return StateDict.load(target), replace(
            report,
            warnings=tuple(in_python(remark) for remark in report.warnings),
            left_out=tuple(
                replace(client, reason=in_python(client.reason))
                for client in sorted((*report.left_out, *refused), key=lambda left: left.name)
            ),
        )


def _put_clients(store: Folders, clients: Mapping[str, StateDict], *, skip: bool) -> list[LeftOut]:
    """Put all clients into memory. Returns those that no folder can hold, or raises InputError."""
    faults = {name: _put_client(store, name, state) for name, state in clients.items()}
    left_out = {name: fault for name, fault in faults.items() if fault is not None}
    if left_out and (not skip or len(left_out) == len(clients)):
        raise next(iter(left_out.values()))
    return [LeftOut(printable(name), at.where, at.found) for name, at in left_out.items()]


def _put_client(store: Folders, name: str, state: StateDict) -> InputError | None:
    try:
        put(store, f"clients/{checked_name(name)}", state)
    except InputError as error:
        return error
    return None


@overload
def distribute_state_dict(
    source: StateDict, *, ranks: Sequence[int], options: DistributeOptions | None = None
) -> dict[int, StateDict]: ...


@overload
def distribute_state_dict(
    source: StateDict, *, like: Mapping[str, StateDict], options: DistributeOptions | None = None
) -> dict[str, StateDict]: ...


def distribute_state_dict(
    source: StateDict,
    *,
    ranks: Sequence[int] = (),
    like: Mapping[str, StateDict] | None = None,
    options: DistributeOptions | None = None,
) -> dict[int, StateDict] | dict[str, StateDict]:
    """The adapter at every rank, by rank; or at the rank and alpha of every client, by name.

    Each is the best approximation of its rank, module by module, as by `distribute`. Of the
    adapters in `like`, only names, shapes and configs are used. Raises UsageError and InputError.
    """
    store = Folders()
    with _in_python():
        put(store, "global", source)
        for name, state in (like or {}).items():
            put(store, f"clients/{checked_name(name)}", state)
        chosen = replace(options or DistributeOptions(), ranks=tuple(ranks))
        target = store.place("result")
        distribute(store.place("global"), target, [store.place("clients")] if like else [], chosen)
        if like:
            return {name: StateDict.load(target / name) for name in like}
        return {rank: StateDict.load(target / f"rank-{rank}") for rank in ranks}


def init_state_dicts(base: str, options: InitOptions) -> dict[int, StateDict]:
    """Initial adapters for a base model, by rank: the ranks of the options, as by `initialize`.

    Raises UsageError and InputError.
    """
    store = Folders()
    with _in_python():
        initialize(base, store.place("result"), (), options)
        return {
            rank: StateDict.load(store.place("result") / f"rank-{rank}") for rank in options.ranks
        }


def cut(state: StateDict, rank: int, scaling: float | None = None) -> StateDict:
    """The first `rank` rank indices of an adapter, at its own scaling or another.

    For a global adapter of a method that truncates by SVD, this is the best approximation of that
    rank, as by `distribute_state_dict`, without another SVD. The update of the first rank indices
    stays the same at every scaling. A rank above the adapter's is padded, which leaves the update
    unchanged. Raises UsageError and InputError.
    """
    store = Folders()
    with _in_python():
        put(store, "global", state)
        adapter = formats.read(store.place("global"))
        alpha = (state.scaling if scaling is None else scaling) * rank
        recipient = recipient_of_rank(adapter, rank, DistributeOptions(ranks=(rank,), alpha=alpha))

        def take(name: str, rank: int, scale: float) -> Factors:
            return _first(adapter, name, rank, scale)

        target = store.place("result")
        with claimed_folder(target, force=False):
            check_room([recipient], target)
            provenance = {"version": __version__, "distributed": "global"}
            hand_out(
                [recipient], take, target, provenance, force=False, jobs=1, progress=lambda *_: None
            )
        return StateDict.load(target / recipient.name)


def _first(adapter: Adapter, name: str, rank: int, scale: float) -> Factors:
    """The first `rank` rank indices of a module, at this scaling, shared evenly by B and A."""
    factors = adapter.modules[name].read()
    share = math.sqrt(factors.scale / scale)
    return Factors(factors.B[:, :rank].double() * share, factors.A[:rank].double() * share, scale)


@contextmanager
def _in_python() -> Iterator[None]:
    """Raise errors of the block with the names of arguments instead of the command's options."""
    try:
        yield
    except FedloraError as error:
        raise error.in_python() from None
