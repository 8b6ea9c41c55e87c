"""One way to aggregate, as a simulation compares it with others."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.errors import UsageError, require
from fedlora_cli.methods import find


def short(value: float) -> str:
    """A number in a name: as short as it can be and no other number's.

    >>> short(1.0), short(0.0007), short(0.00100000001)
    ('1', '0.0007', '0.00100000001')
    """
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


@dataclass(frozen=True)
class Arm:
    """One way to aggregate that is compared with others: a method, its quorum, its momentum.

    >>> Arm("raflora", quorum=0.5, momentum=0.8).name
    'raflora-q0.5-b0.8'
    """

    method: str
    quorum: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        method = find(self.method)
        if self.quorum is not None and method.with_quorum is None:
            found = f"the rule of {self.method} has no quorum"
            raise UsageError("--quorum", found, "choose raflora")
        if method.compress == "none" and method.merge == "sum":
            found = f"clients of {self.method} merge the whole stack into their base model"
            raise UsageError("--method", found, "leave it out; to truncate it is flexlora")
        if method.merge == "shared":
            found = f"{self.method} needs clients that freeze A, and these train both factors"
            raise UsageError("--method", found, "leave it out")
        if self.momentum and method.compress == "none":
            found = f"{self.method} does not truncate its sum to a rank"
            raise UsageError("--momentum", found, "choose raflora, residual or flexlora")
        require(self.quorum is None or 0 <= self.quorum <= 1, "--quorum", self.quorum, "in [0, 1]")
        require(0 <= self.momentum < 1, "--momentum", self.momentum, "in [0, 1)")

    @property
    def name(self) -> str:
        """The name of its folder, and of its row."""
        quorum = "" if self.quorum is None else f"-q{short(self.quorum)}"
        return f"{self.method}{quorum}" + (f"-b{short(self.momentum)}" if self.momentum else "")
