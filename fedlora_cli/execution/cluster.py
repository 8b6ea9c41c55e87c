"""The workers that `--cluster` names: processes of this machine, or a Dask cluster."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

from fedlora_cli.errors import UsageError
from fedlora_cli.execution.workers import ClusterWarning, Workers

__all__ = ["ClusterWarning", "Workers", "check_form", "connected"]

_FORM = re.compile(r"(processes|local):[1-9][0-9]{0,3}|(tcp|tls)://[^\s/]+:([0-9]{1,5})")

_LAST_PORT = 65535


def check_form(cluster: str) -> None:
    """Raise UsageError unless `cluster` has a valid form.

    >>> check_form("processes:4"), check_form("local:2"), check_form("tcp://head:8786")
    (None, None, None)
    """
    form = _FORM.fullmatch(cluster)
    if not form or not 1 <= int(form[3] or 1) <= _LAST_PORT:
        cure = "give tcp://HOST:PORT or tls://HOST:PORT of a scheduler, local:N or processes:N"
        cure += f", N from 1 to 9999, PORT from 1 to {_LAST_PORT}"
        raise UsageError("--cluster", f"{cluster[:80]!r} is not a cluster", cure)


def connected(cluster: str) -> AbstractContextManager[Workers]:
    """The workers that `cluster` names, for the block. Raises UsageError and ClusterError.

    Functions to run must be defined in a module, so that they can be pickled.
    """
    check_form(cluster)
    kind, _, rest = cluster.partition(":")
    # Imported when needed: each takes a tenth of a second.
    if kind == "processes":
        from fedlora_cli.execution.processes import on_processes

        return on_processes(int(rest))
    from fedlora_cli.execution.dask import on_dask

    return on_dask(cluster)
