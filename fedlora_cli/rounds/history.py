"""The last two global adapters of a federation, found in the folder of its rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedlora_cli.aggregation.options import Options
from fedlora_cli.analysis.places import round_name, rounds_in
from fedlora_cli.render.view import natural


def with_history(options: Options, output: Path) -> tuple[Options, tuple[str, ...]]:
    """The options with `rounds` resolved to the earlier global adapters, and a remark.

    In the first round there is none, and nothing to gain momentum from. In the second one the step
    is taken from the start, where every update is zero. Raises InputError.
    """
    if options.rounds is None:
        return options, ()
    found = earlier_rounds(options.rounds, output)
    if not found:
        remark = f"no earlier round in {options.rounds}: this counts as the first one"
        return replace(options, momentum=0.0), (remark,)
    before = found[-2] if options.momentum and len(found) > 1 else None
    return replace(options, previous=found[-1], before_previous=before), ()


def earlier_rounds(rounds: Path, output: Path) -> list[Path]:
    """The global adapters in a folder of rounds, up to the round that `output` belongs to.

    Raises InputError.
    """
    found = rounds_in(rounds)
    place, home = output.resolve(), rounds.resolve()
    if home not in place.parents:
        return found
    own = natural(place.relative_to(home).parts[0])
    return [one for one in found if natural(round_name(one)) < own]
