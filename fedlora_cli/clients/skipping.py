"""Leaving out faulty clients: `--on-bad-client skip`.

A client is faulty if its folder has a fault, or if its adapter differs from a majority of the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TypeVar

from fedlora_cli import formats
from fedlora_cli.clients import reading
from fedlora_cli.clients.cohort import Client, Cohort, align
from fedlora_cli.clients.majority import Undecided
from fedlora_cli.clients.names import distinct_folders, name_clients, name_of
from fedlora_cli.clients.reading import LeftOut, LoadedCohort
from fedlora_cli.errors import InputError
from fedlora_cli.remote import Location, Remote, below, normal
from fedlora_cli.text import printable

T = TypeVar("T")

_folder = attrgetter("folder")
_path = attrgetter("adapter.path")


def select_clients(
    paths: Sequence[Location],
    samples: Location | None = None,
    base_model: str | None = None,
    *,
    adapter: str | None = None,
    max_count_ratio: float | None = None,
    min_clients: int = 1,
) -> LoadedCohort:
    """The clients in `paths`, as `read_clients` finds them, but for those with faulty headers.

    Raises InputError for a fault that belongs to no single client (a damaged file of counts), if
    fewer than `min_clients` remain, and if the clients that fit each other are no majority.
    """
    faults: list[InputError] = []
    folders, remarks = distinct_folders(paths, faults.append, adapter)
    order = {path: number for number, path in reversed([*enumerate(paths)])}
    faults_by_place = {_client_folder(fault, order): fault for fault in reversed(faults)}
    valid = {_spelled(folder) for folder in folders}  # a second path of such a folder is no client
    names = {normal(place): name_of(place) for place in (*folders, *faults_by_place)}
    left_out = [
        _left_out(name_of(place), place, fault, names)
        for place, fault in faults_by_place.items()
        if _spelled(place) not in valid
    ]

    faults = []
    uploads = reading.read_uploads(name_clients(folders, faults.append), adapter, faults.append)
    uploads, faulty = _split_by_fault(uploads, _folder, faults)
    left_out += [_left_out(upload.name, upload.folder, fault, names) for upload, fault in faulty]

    faults = []
    counts, count_remarks = reading.sample_counts(
        uploads,
        samples,
        faults.append,
        others=[client.name for client in left_out],
        adapter=adapter,
        max_count_ratio=max_count_ratio,
    )
    number = len(uploads)
    uploads, faulty = _split_by_fault(uploads, _folder, faults)
    if faulty:  # the median, which decides about a count, depends on all counts
        check_majority(len(uploads), number, faults)
    left_out += [_left_out(upload.name, upload.folder, fault, names) for upload, fault in faulty]

    counts = {u.folder: counts[u.folder] for u in uploads if u.folder in counts}
    cohort, all_left_out = _compatible(
        reading.clients_of(uploads, counts), base_model, left_out, min_clients
    )
    remarks = (*count_remarks, *remarks)
    return reading.loaded(cohort, counts, samples, adapter, remarks, all_left_out)


def leave_out(
    loaded_cohort: LoadedCohort,
    faults: Sequence[InputError],
    base_model: str | None = None,
    min_clients: int = 1,
) -> LoadedCohort:
    """The cohort without the clients that have a fault; the same object without faults.

    Raises InputError as `select_clients` does.
    """
    if not faults:
        return loaded_cohort
    before = loaded_cohort.cohort.clients
    clients, faulty = _split_by_fault(before, _path, faults)
    left_out = [*loaded_cohort.left_out, *_left_out_clients(faulty, before)]
    cohort, all_left_out = _compatible(clients, base_model, left_out, min_clients)
    return replace(loaded_cohort, cohort=cohort, left_out=all_left_out)


def check_number(clients: int, left_out: Sequence[LeftOut], least: int) -> None:
    """Raise InputError if fewer than `least` clients remain."""
    if clients >= least:
        return
    found = f"only {clients} of {clients + len(left_out)} clients"
    if left_out:
        found += f"; {left_out[0].name} is left out: {left_out[0].reason}"
    raise InputError(f"--min-clients {least}", found, "mend or add clients, or lower --min-clients")


def check_majority(fit: int, clients: int, faults: Sequence[InputError]) -> None:
    """Raise InputError unless the compatible clients are a majority of all.

    Without a majority, it is unknown which clients are at fault.
    """
    if 2 * fit <= clients:
        raise _undecided(faults[0])


def _undecided(fault: InputError) -> InputError:
    reason = "no client is left out, because the others are no majority"
    return fault.with_cure(f"{fault.cure}; {reason}")


def _compatible(
    clients: Sequence[Client], base_model: str | None, left_out: Sequence[LeftOut], least: int
) -> tuple[Cohort, tuple[LeftOut, ...]]:
    """The cohort of the compatible clients, and all clients that are left out.

    A client that is left out can change the majority, so the check is repeated.
    """
    all_left_out = list(left_out)
    while True:
        check_number(len(clients), all_left_out, least)
        faults: list[InputError] = []
        cohort = align(clients, base_model, faults.append)
        # An undecided disagreement may end when the clients with other faults are gone.
        faults = [fault for fault in faults if not isinstance(fault, Undecided)] or faults
        remaining, faulty = _split_by_fault(clients, _path, faults)
        if not faulty:
            return cohort, tuple(sorted(all_left_out, key=attrgetter("name", "path")))
        check_majority(len(remaining), len(clients), faults)
        all_left_out += _left_out_clients(faulty, clients)
        clients = remaining


def _split_by_fault(
    items: Sequence[T], path_of: Callable[[T], Location], faults: Sequence[InputError]
) -> tuple[list[T], list[tuple[T, InputError]]]:
    """The items without a fault below their path, and the others, each with its first fault.

    Raises the first fault that lies below no item's path.
    """
    paths = {path_of(item) for item in items}
    first: dict[Location, InputError] = {}
    for fault in faults:
        places = () if fault.path is None else (fault.path, *fault.path.parents)
        path = next((place for place in places if place in paths), None)
        if path is None:
            raise _undecided(fault) if isinstance(fault, Undecided) else fault
        first.setdefault(path, fault)
    return (
        [item for item in items if path_of(item) not in first],
        [(item, first[path_of(item)]) for item in items if path_of(item) in first],
    )


def _client_folder(fault: InputError, order: Mapping[Location, int]) -> Location:
    """The folder of the client with this fault, found while folders were searched.

    `order` are the paths of the command line by position. The folder is such a path or its child;
    of several paths around the fault, the first counts. Raises the fault if there is none.
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
    """The absolute path with all links resolved, except one at its end."""
    absolute = normal(place)
    return absolute.parent.resolve() / absolute.name


def _left_out_clients(
    faulty: Sequence[tuple[Client, InputError]], clients: Sequence[Client]
) -> list[LeftOut]:
    names = {normal(_path(client)): client.name for client in clients}
    return [_left_out(client.name, _path(client), fault, names) for client, fault in faulty]


def _left_out(
    name: str, place: Location, fault: InputError, names: Mapping[Location, str]
) -> LeftOut:
    """The report's row: the file inside the client's folder and the fault, in which the names of
    clients replace their folders.
    """

    def without_folders(path: Location) -> str:
        absolute = normal(path)
        home = next((place for place in (absolute, *absolute.parents) if place in names), None)
        if home is not None:
            return "/".join((names[home], *below(absolute, home)))
        return str(path) if isinstance(path, Remote) else absolute.name

    found = fault.reported(without_folders)
    inside = () if fault.path is None else below(fault.path, place)
    reason = f"{'/'.join(inside)}: {found}" if inside else found
    return LeftOut(printable(name), printable(place), printable(reason))
