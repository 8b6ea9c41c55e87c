"""The report that `fedlora aggregate` writes beside a global adapter: reading and writing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlora_cli.clients.sample_counts import MOST_SAMPLES
from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.digests import sha256_of
from fedlora_cli.files.documents import MAX_VALUES, exists, read_object
from fedlora_cli.files.writing import write_text
from fedlora_cli.formats import FILES
from fedlora_cli.remote import Location

REPORT = "fedlora.json"

#: The prefix of the schema of every report of an aggregation.
AGGREGATE = "fedlora.aggregate/"

#: The largest report. 50 000 modules at rank 64 take 80 MB: 20 bytes per singular value, and 3 per
#: client and module.
MAX_BYTES = 128 * 1024 * 1024

#: Limits beyond every real rank and every real energy.
_LARGEST_RANK = 2**24
_LARGEST = 1e290

_CURE = "take the file that fedlora wrote, or move it away"


@dataclass(frozen=True)
class Contributor:
    """A client of the round. `energy` is that of its update by singular direction, summed over
    modules.
    """

    name: str
    rank: int
    samples: float
    energy: tuple[float, ...]


@dataclass(frozen=True)
class Provenance:
    """How a global adapter was made: `previous` with a previous adapter, `momentum` with momentum,
    `uniform` if every client had the same rank in all modules. `quorum` is None for the default.
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
    """The provenance of the adapter in `folder`; None if fedlora did not aggregate it.

    Raises InputError for a damaged report.
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
    if not all(isinstance(module, dict) for module in modules):
        raise _wrong(path, "modules", modules)
    ranks = [_field(path, module, "ranks", list) for module in modules]
    contributors = tuple(_contributor(path, client) for client in clients)
    return Provenance(
        method=_field(path, document, "method", str),
        version=_field(path, document, "version", str),
        shared_rank=_rank(path, document, "shared_rank"),
        quorum=quorum,
        previous="--previous" in options,
        momentum="--momentum" in options,
        uniform=all(row == [client.rank for client in contributors] for row in ranks),
        clients=contributors,
    )


def write_report(folder: Location, text: str) -> None:
    """Write the report of an adapter into its folder. Raises OSError, and OutputError as
    `check_report` does.
    """
    check_report(len(text.encode()), text.count(","))
    write_text(folder / REPORT, text)


def check_report(size: int, values: int) -> None:
    """Check that a report of this size can be read again. Raises OutputError."""
    if size > MAX_BYTES or values > MAX_VALUES:
        found = f"it would have {size} bytes and {values} values"
        cure = f"aggregate fewer modules or clients; the limits are {MAX_BYTES} and {MAX_VALUES}"
        raise OutputError(REPORT, found, cure)


def read_report(folder: Location) -> dict[str, Any]:
    """The report in `folder`, of any command. Raises InputError."""
    return read_object(folder / REPORT, finite=False, most=MAX_BYTES)


def check_manifest(folder: Location) -> None:
    """Check the files beside a report against the SHA-256 digests in the report.

    Raises InputError for a missing file, or a different digest.
    """
    path = folder / REPORT
    if not exists(path):
        return
    document = read_report(folder)
    written = document.get("files")
    if not str(document.get("schema", "")).startswith(AGGREGATE) or not isinstance(written, dict):
        return
    for name, digest in written.items():
        # Reports are untrusted: only known names become paths.
        if name in FILES and sha256_of(folder / name) != digest:
            found = f"changed since fedlora wrote it: its SHA-256 differs from the one in {REPORT}"
            cure = f"restore it, or move {REPORT} away if the change is intended"
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
    """Whether the value is a number from 0 to `largest`."""
    return type(value) in (int, float) and 0 <= value <= largest


def _wrong(path: Location, name: str, value: Any) -> InputError:
    return InputError(path, f"{name} is {repr(value)[:80]}", _CURE)
