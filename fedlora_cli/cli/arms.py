"""The arms of a simulation from the options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fedlora_cli.errors import UsageError
from fedlora_cli.methods import find
from fedlora_cli.options import numbers
from fedlora_cli.simulation.arm import Arm

_EXAMPLE = "write raflora or raflora:quorum=0.5:momentum=0.8"


@dataclass(frozen=True)
class _Item:
    """A method with its own quorum and momentum, None where it has none."""

    method: str
    quorum: float | None = None
    momentum: float | None = None


def arms_of(
    methods: Sequence[str], quorum: str | None, momentum: str | None, known: Sequence[Arm]
) -> tuple[Arm, ...]:
    """The given methods, or else the known arms, crossed with the lists of quorums and of momenta.

    A list applies to each method that has the option and no value of its own. Raises UsageError.

    >>> [arm.name for arm in arms_of(["flexlora,raflora"], "0,0.5", None, ())]
    ['flexlora', 'raflora-q0', 'raflora-q0.5']
    >>> [arm.name for arm in arms_of(["raflora:quorum=1", "rbla"], None, "0,0.8", ())]
    ['raflora-q1', 'raflora-q1-b0.8', 'rbla']
    """
    items = [_parsed(item) for text in methods for item in text.split(",")]
    if not items:
        every = (
            _Item(
                arm.method,
                arm.quorum if quorum is None else None,
                arm.momentum if momentum is None else None,
            )
            for arm in known
        )
        items = list(dict.fromkeys(every))
    quorums = None if quorum is None else numbers("--quorum", quorum)
    momenta = None if momentum is None else numbers("--momentum", momentum)
    open_quorum = [i for i in items if i.quorum is None and find(i.method).with_quorum]
    open_momentum = [i for i in items if i.momentum is None and find(i.method).compress != "none"]
    for flag, values, takers in (
        ("--quorum", quorums, open_quorum),
        ("--momentum", momenta, open_momentum),
    ):
        if values is not None and not takers:
            raise UsageError(flag, "no given method can take it", "add raflora")
    return tuple(
        Arm(item.method, q, b)
        for item in items
        for q, b in product(
            quorums if quorums is not None and item in open_quorum else (item.quorum,),
            momenta if momenta is not None and item in open_momentum else (item.momentum or 0.0,),
        )
    )


def _parsed(text: str) -> _Item:
    """`NAME[:quorum=Q][:momentum=B]`. Raises UsageError.

    >>> _parsed("raflora:momentum=0.8")
    _Item(method='raflora', quorum=None, momentum=0.8)
    """
    name, *choices = text.strip().split(":")
    chosen: dict[str, float] = {}
    for choice in choices:
        key, _, value = choice.partition("=")
        if key not in ("quorum", "momentum") or key in chosen:
            raise UsageError("--method", f"{text[:60]!r} is not an arm", _EXAMPLE)
        chosen[key] = numbers("--method", value)[0]
    if not name:
        raise UsageError("--method", f"{text[:60]!r} is not an arm", _EXAMPLE)
    return _Item(name, chosen.get("quorum"), chosen.get("momentum"))
