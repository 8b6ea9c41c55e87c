"""What `fedlora aggregate` wrote beside a global adapter: of whom it was made, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_cli.clients.sample_counts import MOST_SAMPLES
from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.digests import sha256_of
from fedlora_cli.files.documents import MAX_VALUES, exists, read_object
from fedlora_cli.formats import FILES
from fedlora_cli.remote import Location

REPORT = "fedlora.json"

#: The beginning of the schema of every aggregation's report.
AGGREGATE = "fedlora.aggregate/"

#: The report about 50 000 modules at rank 64 has 80 MB: a singular value takes 20 bytes, and the
#: rank of one client in one module 3.
MAX_BYTES = 128 * 1024 * 1024

#: Beyond the side of any matrix, and beyond the energy of any update that was aggregated.
_LARGEST_RANK = 2**24
_LARGEST = 1e290

_CURE = "take the file that fedlora wrote, or move it away"


@dataclass(frozen=True)
class Contributor:
    """A client of that round. `energy` is that of its own update by singular direction, pooled over
    modules.
    """

    name: str
    rank: int
    samples: float
    energy: tuple[float, ...]


@dataclass(frozen=True)
class Provenance:
    """How a global adapter came about. `previous` says whether it had a previous one to build on,
    `momentum` whether it went on in the direction of the last two, `uniform` whether every client
    had one rank in all modules. `quorum` is None for the method's own.
    """

    method: str
    version: str
    shared_rank: int
    quorum: float | None
    previous: bool
    momentum: bool
    uniform: bool
    clients: tuple[Contributor, ...]


def read_provenance(folder: Location) -> Provenance | None:
    """What is known of the adapter in `folder`; None where fedlora did not aggregate it.

    Raises InputError for a report that is damaged.
    """
    path = folder / REPORT
    if not exists(path):
        return None
    document = read_report(folder)
    if not str(document.get("schema", "")).startswith(AGGREGATE):
        return None
    options = _field(path, document, "options", dict)
    quorum = options.get("--quorum")
    if quorum is not None and not _is_number(quorum, 1):
        raise _wrong(path, "--quorum", quorum)
    clients = _field(path, document, "clients", list)
    if not clients:
        raise _wrong(path, "clients", clients)
    modules = _field(path, document, "modules", list)
    if not all(isinstance(one, dict) for one in modules):
        raise _wrong(path, "modules", modules)
    ranks = [_field(path, one, "ranks", list) for one in modules]
    contributors = tuple(_contributor(path, client) for client in clients)
    return Provenance(
        method=_field(path, document, "method", str),
        version=_field(path, document, "version", str),
        shared_rank=_rank(path, document, "shared_rank"),
        quorum=quorum,
        previous="--previous" in options,
        momentum="--momentum" in options,
        uniform=all(one == [client.rank for client in contributors] for one in ranks),
        clients=contributors,
    )


def write_report(folder: Path, text: str) -> None:
    """Write the report of an adapter into its folder. Raises OSError, and OutputError as
    `check_report` does.
    """
    content = text.encode()
    check_report(len(content), text.count(","))
    (folder / REPORT).write_bytes(content)


def check_report(size: int, values: int) -> None:
    """Whether a report of so many bytes and values can be read again. Raises OutputError."""
    if size > MAX_BYTES or values > MAX_VALUES:
        found = f"it would have {size} bytes and {values} values"
        cure = f"aggregate fewer modules or clients: {MAX_BYTES} and {MAX_VALUES} are read"
        raise OutputError(REPORT, found, cure)


def read_report(folder: Location) -> dict[str, Any]:
    """The report in `folder`, whatever it is about. Raises InputError."""
    return read_object(folder / REPORT, finite=False, most=MAX_BYTES)


def check_manifest(folder: Location) -> None:
    """Whether the files that fedlora wrote beside its report are as it wrote them.

    Raises InputError where one is missing, or its SHA-256 is not the one in the report.
    """
    path = folder / REPORT
    if not exists(path):
        return
    document = read_report(folder)
    written = document.get("files")
    if not str(document.get("schema", "")).startswith(AGGREGATE) or not isinstance(written, dict):
        return
    for name, digest in written.items():
        # Reports are not to be trusted either: names never become paths.
        if name in FILES and sha256_of(folder / name) != digest:
            found = f"not as fedlora wrote it: its SHA-256 is not the one in {REPORT}"
            cure = f"restore it, or move {REPORT} away if the change is meant"
            raise InputError(folder / name, found, cure)


def _contributor(path: Location, client: Any) -> Contributor:
    if not isinstance(client, dict):
        raise _wrong(path, "a client", client)
    samples = _field(path, client, "samples", (int, float))
    energy = _field(path, client, "energy", list)
    rank = _rank(path, client, "rank")
    whole = len(energy) <= rank and all(_is_number(value, _LARGEST) for value in energy)
    if not whole or not _is_number(samples, MOST_SAMPLES):
        raise _wrong(path, "samples or energy of a client", client)
    return Contributor(
        name=_field(path, client, "name", str),
        rank=rank,
        samples=float(samples),
        energy=tuple(float(value) for value in energy),
    )


def _rank(path: Location, document: dict[str, Any], name: str) -> int:
    value = _field(path, document, name, int)
    if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
        raise _wrong(path, name, value)
    return value


def _field(path: Location, document: dict[str, Any], name: str, kind: Any) -> Any:
    value = document.get(name)
    if not isinstance(value, kind):
        raise _wrong(path, name, value)
    return value


def _is_number(value: Any, largest: float) -> bool:
    """A number that counts something, from 0 to the largest that there can be."""
    return type(value) in (int, float) and 0 <= value <= largest


def _wrong(path: Location, name: str, value: Any) -> InputError:
    return InputError(path, f"{name} is {repr(value)[:80]}", _CURE)
