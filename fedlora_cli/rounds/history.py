"""The last two global adapters of a federation, found in the folder of its rounds."""

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

    In the first round there is none, and nothing to gain momentum from. In the second one the step
    is taken from the start, where every update is zero. Raises UsageError and InputError.
    """
    if options.rounds is None:
        return options, ()
    if options.previous is not None or options.before_previous is not None:
        found = "given together with --previous or --before-previous"
        raise UsageError("--rounds", found, "it finds them; give it alone")
    earlier = earlier_rounds(options.rounds, output)
    if not earlier:
        home = options.rounds.resolve()
        # Where the round itself stands in that folder, there is nothing odd about the first one.
        odd = home not in output.resolve().parents
        remark = f"no earlier round in {home.name}: this counts as the first one"
        return replace(options, momentum=0.0), (remark,) if odd else ()
    before = earlier[-2] if options.momentum and len(earlier) > 1 else None
    return replace(options, previous=earlier[-1], before_previous=before), ()


def earlier_rounds(rounds: Location, output: Location) -> list[Location]:
    """The global adapters in a folder of rounds, up to the round that `output` belongs to.

    Raises InputError.
    """
    found = rounds_in(rounds)
    place, home = output.resolve(), rounds.resolve()
    if home not in place.parents:
        return found
    own = natural(below(place, home)[0])
    return [one for one in found if natural(round_name(one)) < own]


def forgotten(plan: Plan, output: Location) -> tuple[str, ...]:
    """A warning where an earlier round had clients of a higher rank, and its global adapter is not
    used by a method that would keep what they brought.
    """
    if plan.previous is not None or not plan.method.uses_previous:
        return ()
    most, where = plan.cohort.rank, None
    for one in _series(output):
        with suppress(InputError):  # of a neighbour that nobody asked for
            known = read_provenance(one)
            ranks = [client.rank for client in known.clients] if known is not None else []
            if max(ranks, default=0) > most:
                most, where = max(ranks), one
    if where is None:
        return ()
    lost = rank_range(plan.cohort.rank + 1, most)
    return (
        f"nobody holds rank index {lost}, as clients of {round_name(where)} did; without --rounds "
        "or --previous, what they brought is lost",
    )


def _series(output: Location) -> list[Location]:
    """The earlier rounds that the name of the output tells: `run/round-03/global` has one in
    `run/round-02/global`, `global-03` in `global-02`. In object storage nobody looks: it takes a
    question for every neighbour.
    """
    if isinstance(output, Remote):
        return []
    place = output.resolve()
    own = place.parent if place.name == GLOBAL else place
    with suppress(InputError):
        found = earlier_rounds(own.parent, output)
        return [one for one in found if series_of(round_name(one)) == series_of(own.name)]
    return []
