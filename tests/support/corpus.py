"""Bad input: what is done to it, and what the error says."""

from __future__ import annotations

from support.bad_clients import CLIENTS, CONFIGS, FACTORS, VALUES
from support.bad_files import CONTAINERS, LINKS

CORPUS = {
    f"{table}: {fault}": case
    for table, cases in {
        "container": CONTAINERS,
        "link": LINKS,
        "config": CONFIGS,
        "factors": FACTORS,
        "values": VALUES,
        "client": CLIENTS,
    }.items()
    for fault, case in cases.items()
}
