"""The options of `fedlora predict`, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.options import POSITIVE_SHARE, SHARE, Check, check_options, option

#: Limits of a forecast: larger numbers are mistakes, or take long.
MOST_CLIENTS = 100_000
MOST_RANK = 4096
MOST_PARTITIONS = 128
MOST_SAMPLES = 1e12
MOST_ROUNDS = 1000

_PANEL = "Assumptions"


@dataclass(frozen=True)
class PredictOptions:
    """The assumptions of a forecast. Raises UsageError for a number out of its range.

    Each round draws `participation` of the clients, at least one, independently. `start` is the ρ
    of round 0, spread evenly within the shared rank and beyond it. `quorum` adds raflora with that
    quorum. `rounds` is the last round of the forecast, in which each method gets a verdict.
    """

    participation: float = option(
        1.0,
        "Share of the clients in each round.",
        "-p",
        panel=_PANEL,
        show_default=True,
        check=POSITIVE_SHARE,
    )
    start: float | None = option(
        None,
        "ρ of round 0; default: the same energy at all rank indices.",
        panel=_PANEL,
        check=Check(lambda rho: 0 < rho < 1, "in (0, 1)"),
    )
    rounds: int | None = option(
        None,
        "Show ρ in every round up to this one, and the verdict in it.",
        panel=_PANEL,
        check=Check(lambda rounds: 1 <= rounds <= MOST_ROUNDS, f"from 1 to {MOST_ROUNDS}"),
    )
    quorum: float | None = option(
        None, "Add a row: raflora with this quorum.", panel=_PANEL, check=SHARE
    )

    def __post_init__(self) -> None:
        check_options(self)
