"""The last two global adapters in a folder of rounds."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import Plan
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.remote import Location, Remote, below
from fedlora_cli.reports.provenance import read_provenance
from fedlora_cli.reports.round_folders import GLOBAL, round_name, rounds_in, series_of
from fedlora_cli.text import natural, rank_range


def with_history(
    options: AggregateOptions, output: Location
) -> tuple[AggregateOptions, tuple[str, ...]]:
    """The options with `rounds` resolved to the earlier global adapters, and a remark.

    The first round has no earlier adapter and no momentum. In the second round, the momentum starts
    from a zero update. Raises UsageError and InputError.
    """
    if options.rounds is None:
        return options, ()
    if options.previous is not None or options.before_previous is not None:
        found = "given together with --previous or --before-previous"
        raise UsageError("--rounds", found, "it finds them; give it alone")
    earlier = earlier_rounds(options.rounds, output)
    if not earlier:
        home = options.rounds.resolve()
        # A first round is expected if the output lies in the folder of rounds.
        expected = home in output.resolve().parents
        remark = f"no earlier round in {home.name}: this counts as the first round"
        return replace(options, momentum=0.0), () if expected else (remark,)
    before = earlier[-2] if options.momentum and len(earlier) > 1 else None
    return replace(options, previous=earlier[-1], before_previous=before), ()


def earlier_rounds(rounds: Location, output: Location) -> list[Location]:
    """The global adapters in a folder of rounds, before the round of `output`.

    Raises InputError.
    """
    adapters = rounds_in(rounds)
    place, home = output.resolve(), rounds.resolve()
    if home not in place.parents:
        return adapters
    current = natural(below(place, home)[0])
    return [adapter for adapter in adapters if natural(round_name(adapter)) < current]


def forgotten(plan: Plan, output: Location) -> tuple[str, ...]:
    """A warning if the previous adapter is not used and an earlier round had higher ranks.

    Only methods that use a previous adapter would keep these rank indices.
    """
    if plan.previous is not None or not plan.method.uses_previous:
        return ()
    largest, earlier = plan.cohort.rank, None
    for adapter in _series(output):
        with suppress(InputError):  # the command names no such folder: its faults do not matter
            provenance = read_provenance(adapter)
            ranks = [client.rank for client in provenance.clients] if provenance is not None else []
            if max(ranks, default=0) > largest:
                largest, earlier = max(ranks), adapter
    if earlier is None:
        return ()
    lost = rank_range(plan.cohort.rank + 1, largest)
    return (
        f"no client has a rank above {plan.cohort.rank}, but clients of {round_name(earlier)} did; "
        f"give --rounds or --previous to keep rank index {lost}",
    )


def _series(output: Location) -> list[Location]:
    """The earlier rounds of the output's series: `run/round-02/global` before
    `run/round-03/global`, `global-02` before `global-03`.

    None in object storage, where every neighbor would cost a request.
    """
    if isinstance(output, Remote):
        return []
    place = output.resolve()
    current = place.parent if place.name == GLOBAL else place
    with suppress(InputError):
        adapters = earlier_rounds(current.parent, output)
        return [a for a in adapters if series_of(round_name(a)) == series_of(current.name)]
    return []
