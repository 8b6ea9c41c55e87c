"""The clients without those at fault: what `--on-bad-client skip` leaves.

A client is at fault for what its own folder holds, and for not being as most of the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fedlora_cli import formats
from fedlora_cli.clients.cohort import Client, Cohort, align
from fedlora_cli.clients.compatibility import Undecided
from fedlora_cli.clients.names import distinct_folders, name_of, named
from fedlora_cli.clients.reading import (
    LeftOut,
    LoadedCohort,
    check_files,
    read_adapters,
    sample_counts,
    uniform,
    vouching,
)
from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location, Remote, below, normal
from fedlora_cli.text import printable

T = TypeVar("T")


def select_clients(
    paths: Sequence[Location],
    samples: Location | None = None,
    base_model: str | None = None,
    *,
    adapter: str | None = None,
    max_count_ratio: float | None = None,
    min_clients: int = 1,
) -> LoadedCohort:
    """The clients in `paths`, as `read_clients` finds them, but for those that headers show to be
    at fault: they are `left_out`.

    Raises InputError for what is no single client's fault, such as a damaged file of counts, where
    fewer than `min_clients` are left, and where most of them would have to be left out because they
    do not fit the others.
    """
    faults: list[InputError] = []
    folders, remarks = distinct_folders(paths, faults.append, adapter)
    order = {path: number for number, path in reversed([*enumerate(paths)])}
    places = {_place(fault, order): fault for fault in reversed(faults)}
    taken = {_spelled(folder) for folder in folders}  # such a one was named once more
    names = {normal(place): name_of(place) for place in (*folders, *places)}
    left_out = [
        _left_out(name_of(place), place, fault, names)
        for place, fault in places.items()
        if _spelled(place) not in taken
    ]

    faults = []
    clients = named(folders, faults.append)
    homes = [formats.inside(one, adapter) for one in folders]
    adapters = dict(zip(folders, read_adapters(homes, faults.append), strict=True))
    check_files(adapters.values(), faults.append)
    clients, faulty = _parted(clients, lambda one: one[1], faults)
    left_out += [_left_out(*one, fault, names) for one, fault in faulty]

    faults = []
    counts, odd = sample_counts(
        clients,
        samples,
        faults.append,
        others=[one.name for one in left_out],
        adapter=adapter,
        max_count_ratio=max_count_ratio,
    )
    everyone = len(clients)
    clients, faulty = _parted(clients, lambda one: one[1], faults)
    if faulty:  # mostly for what others told, which moves the median
        check_majority(len(clients), everyone, faults)
    left_out += [_left_out(*one, fault, names) for one, fault in faulty]

    counts = {folder: counts[folder] for _, folder in clients if folder in counts}
    cohort, misfits = _fitting(
        [Client(name, adapters[folder], counts.get(folder, 1.0)) for name, folder in clients],
        base_model,
        left_out,
        min_clients,
    )
    return LoadedCohort(
        cohort=cohort,
        counts_by_path={formats.inside(folder, adapter): count for folder, count in counts.items()},
        samples_from=vouching(samples, counts),
        remarks=(*uniform(counts), *odd, *remarks),
        left_out=misfits,
    )


def leave_out(
    found: LoadedCohort,
    faults: Sequence[InputError],
    base_model: str | None = None,
    min_clients: int = 1,
) -> LoadedCohort:
    """The clients without those at fault. Raises InputError as `select_clients` does."""
    if not faults:
        return found
    clients, faulty = _parted(found.cohort.clients, _home, faults)
    names = _names(found.cohort.clients)
    left_out = [*found.left_out, *(_of_client(one, fault, names) for one, fault in faulty)]
    cohort, everyone = _fitting(clients, base_model, left_out, min_clients)
    return replace(found, cohort=cohort, left_out=everyone)


def check_number(clients: int, left_out: Sequence[LeftOut], least: int) -> None:
    """Whether so many clients are enough. Raises InputError."""
    if clients >= least:
        return
    found = f"only {clients} of {clients + len(left_out)} clients"
    if left_out:
        found += f"; {left_out[0].name} is left out: {left_out[0].reason}"
    raise InputError(f"--min-clients {least}", found, "mend or add clients, or ask for fewer")


def check_majority(fit: int, clients: int, faults: Sequence[InputError]) -> None:
    """Whether those that fit each other are most of all clients: otherwise nobody knows who is at
    fault. Raises InputError.
    """
    if 2 * fit <= clients:
        raise _undecided(faults[0])


def _undecided(fault: InputError) -> InputError:
    return fault.with_cure(f"{fault.cure}; nobody is left out, as the others are no majority")


def _fitting(
    clients: Sequence[Client], base_model: str | None, left_out: Sequence[LeftOut], least: int
) -> tuple[Cohort, tuple[LeftOut, ...]]:
    """The cohort of those that fit each other. With some gone, most may say something else."""
    everyone, names = list(left_out), _names(clients)
    while True:
        check_number(len(clients), everyone, least)
        faults: list[InputError] = []
        cohort = align(clients, base_model, faults.append)
        # Without those at fault, the rest may agree.
        faults = [one for one in faults if not isinstance(one, Undecided)] or faults
        fit, faulty = _parted(clients, _home, faults)
        if not faulty:
            return cohort, tuple(sorted(everyone, key=lambda one: (one.name, one.path)))
        check_majority(len(fit), len(clients), faults)
        everyone += [_of_client(one, fault, names) for one, fault in faulty]
        clients = fit


def _parted(
    items: Sequence[T], home: Callable[[T], Location], faults: Sequence[InputError]
) -> tuple[list[T], list[tuple[T, InputError]]]:
    """Those without a fault in their home, and the others with the first one.

    Raises the first fault that is in nobody's home.
    """
    homes = {home(item) for item in items}
    first: dict[Location, InputError] = {}
    for fault in faults:
        places = () if fault.path is None else (fault.path, *fault.path.parents)
        owner = next((place for place in places if place in homes), None)
        if owner is None:
            raise _undecided(fault) if isinstance(fault, Undecided) else fault
        first.setdefault(owner, fault)
    return (
        [item for item in items if home(item) not in first],
        [(item, first[home(item)]) for item in items if home(item) in first],
    )


def _place(fault: InputError, order: Mapping[Location, int]) -> Location:
    """The folder of the client that a fault is about, which was found in looking for clients: what
    was named, or what lies in it; of several, what was named first. `order` are the places on the
    command line. Raises the fault if there is none.
    """
    around = () if fault.path is None else (fault.path, *fault.path.parents)
    given = [place for place in around if place in order]
    if not given:
        raise fault
    path: Location = min(given, key=lambda place: order[place])
    if path == around[0] or formats.is_adapter(path):
        return path
    return path / below(around[0], path)[0]


def _spelled(place: Location) -> Location:
    """A place whatever way it was named, but for a link in place of it."""
    whole = normal(place)
    return whole.parent.resolve() / whole.name


def _home(client: Client) -> Location:
    return client.adapter.path


def _names(clients: Sequence[Client]) -> dict[Location, str]:
    return {normal(_home(client)): client.name for client in clients}


def _of_client(client: Client, fault: InputError, names: Mapping[Location, str]) -> LeftOut:
    return _left_out(client.name, _home(client), fault, names)


def _left_out(
    name: str, place: Location, fault: InputError, names: Mapping[Location, str]
) -> LeftOut:
    """What a report says of it: in which file of the folder, and what was found, with the clients'
    names in place of their folders.
    """

    def called(other: Location) -> str:
        whole = normal(other)
        home = next((one for one in (whole, *whole.parents) if one in names), None)
        if home is not None:
            return "/".join((names[home], *below(whole, home)))
        return str(other) if isinstance(other, Remote) else whole.name

    found = fault.reported(called)
    inside = () if fault.path is None else below(fault.path, place)
    reason = f"{'/'.join(inside)}: {found}" if inside else found
    return LeftOut(printable(name), printable(place), printable(reason))
