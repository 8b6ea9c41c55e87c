"""What a fuzzer did: it ends without a last word, so it is told as it goes."""

from __future__ import annotations

import sys

_EVERY = 10_000


class Tally:
    """Counts executions and how many inputs were accepted."""

    def __init__(self) -> None:
        self.executions = 0
        self.accepted = 0

    def count(self, *, accepted: bool) -> None:
        self.executions += 1
        self.accepted += accepted
        if self.executions % _EVERY == 0:
            sys.stderr.write(f"{self.executions} executions, {self.accepted} accepted\n")
