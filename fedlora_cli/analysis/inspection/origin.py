"""Whether fedlora wrote an adapter itself, by what stands beside the weights or in them."""

from __future__ import annotations

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import exists, parse_object
from fedlora_cli.files.safetensors import read_metadata
from fedlora_cli.formats import FORMATS
from fedlora_cli.remote import Location
from fedlora_cli.reports.inspect import Origin
from fedlora_cli.reports.provenance import AGGREGATE, REPORT, read_provenance, read_report

#: Characters of a name that stands in an untrusted file.
_LONGEST = 80


def is_reported(folder: Location) -> bool:
    """Whether a report beside the adapter says that fedlora aggregated it, well or damaged."""
    try:
        document = read_report(folder)
    except InputError:
        return False
    return str(document.get("schema", "")).startswith(AGGREGATE)


def origin(folder: Location) -> Origin | None:
    """How fedlora made the adapter in `folder`; None where it did not, or nobody can tell.

    Where weights travel alone, their own metadata is asked.
    """
    try:
        if not exists(folder / REPORT):
            return _from_metadata(_weights(folder))
        said = read_provenance(folder)
    except InputError:
        return None
    if said is None:
        return None
    clients = len(said.clients)
    return Origin(said.method[:_LONGEST], said.version[:_LONGEST], clients, said.shared_rank)


def _weights(path: Location) -> Location:
    """The weights of an adapter in a folder, in whichever format, or of one that is a file."""
    places = (path / known.weights for known in FORMATS.values())
    return path if path.is_file() else next((one for one in places if exists(one)), path)


def _from_metadata(weights: Location) -> Origin | None:
    """What the `write` of a format was given to keep. Raises InputError."""
    text = read_metadata(weights).get("fedlora")
    match {} if text is None else parse_object(text.encode(), where=weights):
        case {
            "method": str(method),
            "version": str(version),
            "shared_rank": int(rank),
            "clients": list() | int() as clients,
        }:
            number = len(clients) if isinstance(clients, list) else clients
            return Origin(method[:_LONGEST], version[:_LONGEST], number, rank)
    return None
