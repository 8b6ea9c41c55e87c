"""Those who run calls, whoever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future


@dataclass(frozen=True)
class Workers:
    """Who runs calls. `submit` takes a function and its argument, `result` waits for what it gave.

    `window` tells how many calls may be under way or wait to be taken: two for every worker that
    there is now.
    """

    submit: Callable[[Callable[[Any], Any], Any], Future[Any]]
    result: Callable[[Future[Any]], Any]
    window: Callable[[], int]


class ClusterWarning(UserWarning):
    """Something about a cluster that its owner should know."""
