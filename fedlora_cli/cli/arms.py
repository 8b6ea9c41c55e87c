"""The arms of a simulation as the command line names them, and its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fedlora_cli.cli.shared import numbers, whole_numbers
from fedlora_cli.errors import UsageError, require
from fedlora_cli.methods import find
from fedlora_cli.simulation.options import Arm

#: As many seeds as a count may ask for.
_MOST_SEEDS = 1000

_EXAMPLE = "write raflora or raflora:quorum=0.5:momentum=0.8"


@dataclass(frozen=True)
class _Named:
    """A method with what was chosen for it alone, None where nothing was."""

    method: str
    quorum: float | None = None
    momentum: float | None = None


def arms_of(
    methods: Sequence[str], quorum: str | None, momentum: str | None, known: Sequence[Arm]
) -> tuple[Arm, ...]:
    """The arms that were named, or else the known ones, crossed with the lists of quorums and of
    momenta: every method that has the choice and no value of its own. Raises UsageError.

    >>> [arm.name for arm in arms_of(["flexlora,raflora"], "0,0.5", None, ())]
    ['flexlora', 'raflora-q0', 'raflora-q0.5']
    >>> [arm.name for arm in arms_of(["raflora:quorum=1", "rbla"], None, "0,0.8", ())]
    ['raflora-q1', 'raflora-q1-b0.8', 'rbla']
    """
    named = [_parsed(item) for text in methods for item in text.split(",")]
    if not named:
        every = (
            _Named(
                arm.method,
                arm.quorum if quorum is None else None,
                arm.momentum if momentum is None else None,
            )
            for arm in known
        )
        named = list(dict.fromkeys(every))
    quorums = None if quorum is None else numbers("--quorum", quorum)
    momenta = None if momentum is None else numbers("--momentum", momentum)
    open_quorum = [one for one in named if one.quorum is None and find(one.method).with_quorum]
    open_momentum = [
        one for one in named if one.momentum is None and find(one.method).compress != "none"
    ]
    for flag, values, takers in (
        ("--quorum", quorums, open_quorum),
        ("--momentum", momenta, open_momentum),
    ):
        if values is not None and not takers:
            raise UsageError(flag, "no method is left that takes it", "add raflora")
    return tuple(
        Arm(one.method, q, b)
        for one in named
        for q, b in product(
            quorums if quorums is not None and one in open_quorum else (one.quorum,),
            momenta if momenta is not None and one in open_momentum else (one.momentum or 0.0,),
        )
    )


def seeds_of(text: str) -> tuple[int, ...]:
    """How many, or which: a comma tells. Raises UsageError.

    >>> seeds_of("3"), seeds_of("4,7"), seeds_of("4,")
    ((0, 1, 2), (4, 7), (4,))
    """
    if "," in text:
        return whole_numbers("--seeds", text.removesuffix(","))
    (size,) = whole_numbers("--seeds", text)
    require(1 <= size <= _MOST_SEEDS, "--seeds", size, f"from 1 to {_MOST_SEEDS}")
    return tuple(range(size))


def _parsed(text: str) -> _Named:
    """`NAME[:quorum=Q][:momentum=B]`. Raises UsageError.

    >>> _parsed("raflora:momentum=0.8")
    _Named(method='raflora', quorum=None, momentum=0.8)
    """
    name, *choices = text.strip().split(":")
    chosen: dict[str, float] = {}
    for choice in choices:
        key, _, value = choice.partition("=")
        if key not in ("quorum", "momentum") or key in chosen:
            raise UsageError("--method", f"{text[:60]!r} is no arm", _EXAMPLE)
        chosen[key] = numbers("--method", value)[0]
    if not name:
        raise UsageError("--method", f"{text[:60]!r} is no arm", _EXAMPLE)
    return _Named(name, chosen.get("quorum"), chosen.get("momentum"))
