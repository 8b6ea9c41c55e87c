"""Workers: the interface of threads, processes and clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future


@dataclass(frozen=True)
class Workers:
    """`submit` starts a call of a function with an argument; `result` waits for its result.

    `window` returns how many calls may be running or waiting to be taken: two for each worker.
    """

    submit: Callable[[Callable[[Any], Any], Any], Future[Any]]
    result: Callable[[Future[Any]], Any]
    window: Callable[[], int]


class ClusterWarning(UserWarning):
    """A problem of a cluster that does not end the command."""
