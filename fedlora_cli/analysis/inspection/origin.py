"""Whether fedlora wrote an adapter, by the report beside the weights or by their metadata."""

from __future__ import annotations

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import exists, parse_object
from fedlora_cli.files.safetensors import read_metadata
from fedlora_cli.formats import FORMATS
from fedlora_cli.remote import Location
from fedlora_cli.reports.inspect import Origin
from fedlora_cli.reports.provenance import AGGREGATE, REPORT, read_provenance, read_report

#: Most characters taken from a name in an untrusted file.
_LONGEST = 80


def is_reported(folder: Location) -> bool:
    """Whether a report of an aggregation lies beside the adapter, intact or damaged."""
    try:
        document = read_report(folder)
    except InputError:
        return False
    return str(document.get("schema", "")).startswith(AGGREGATE)


def origin(folder: Location) -> Origin | None:
    """The origin of the adapter in `folder`: from its report, or from the metadata of its weights
    if there is no report. None if fedlora did not write it or the origin cannot be read.
    """
    try:
        if not exists(folder / REPORT):
            files = (folder / known.weights for known in FORMATS.values())
            alone = folder.is_file()  # the adapter is the file itself
            return _from_metadata(folder if alone else next(filter(exists, files), folder))
        made = read_provenance(folder)
    except InputError:
        return None
    if made is None:
        return None
    clients = len(made.clients)
    return Origin(made.method[:_LONGEST], made.version[:_LONGEST], clients, made.shared_rank)


def _from_metadata(weights: Location) -> Origin | None:
    """The origin that a format wrote into the metadata of the weights. Raises InputError."""
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
