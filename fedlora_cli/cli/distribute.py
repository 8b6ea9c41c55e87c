"""`fedlora distribute`: the global adapter at every client's rank."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from fedlora_cli.aggregation.options import AggregateOptions, Dtype
from fedlora_cli.cli.distribution import (
    OUTPUT,
    Alpha,
    HandoutForce,
    HandoutJobs,
    Like,
    LikeAdapter,
    folders_like,
    print_result,
    ranks_of,
)
from fedlora_cli.cli.shared import (
    Base,
    Debug,
    Json,
    Null,
    Quiet,
    errors,
    guarded,
    heavy_imports,
    option,
    quoted,
)
from fedlora_cli.errors import InputError
from fedlora_cli.files.locations import location
from fedlora_cli.methods import METHODS
from fedlora_cli.remote import Location
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.distribution import distribute_view
from fedlora_cli.reports.document import distribute_document
from fedlora_cli.reports.provenance import read_provenance
from fedlora_cli.rounds.options import DistributeOptions


@guarded
def distribute(
    source: Annotated[
        str, typer.Argument(metavar="GLOBAL", help="The folder of the global adapter.")
    ],
    output: Annotated[
        str, option("--output", "-o", metavar="DIR", help="Write a folder for each client here.")
    ],
    like: Like = None,
    adapter: LikeAdapter = None,
    rank: Annotated[
        list[str] | None,
        option(
            "--rank", "--ranks", "-r", metavar="R,R,...", help="Instead: one adapter at each rank."
        ),
    ] = None,
    alpha: Alpha = None,
    base: Base = None,
    dtype: Annotated[
        Dtype | None,
        option("--dtype", panel=OUTPUT, help="Default: the clients' own, or the global's."),
    ] = None,
    jobs: HandoutJobs = 0,
    force: HandoutForce = False,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every adapter and every module.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Hand the global adapter to every client at its own rank, to train from.

    Examples:

    fedlora distribute global -o round-02 --like round-01

    fedlora distribute global -o by-rank --rank 4,8,16
    """
    options = DistributeOptions(
        ranks=ranks_of("--rank", rank or []),
        alpha=alpha,
        dtype=dtype,
        base=base,
        jobs=jobs,
        force=force,
        adapter=adapter,
    )
    place, clients = location(source), folders_like(like, null=null)
    with heavy_imports():
        from fedlora_cli.rounds.distribute import distribute as run

    with progress_on(errors(), shown=not quiet) as stage:
        report = run(place, output, clients, options, stage)
    print_result(
        report,
        distribute_document,
        partial(distribute_view, details=verbose),
        json=json,
        quiet=quiet,
        following=f"fedlora aggregate CLIENTS -o DIR{_as_before(place)}",
    )


def _as_before(source: Location) -> str:
    """The options that go on as the global adapter was made, as far as its report can be read."""
    known = None
    with suppress(InputError):
        known = read_provenance(source)
    method = METHODS.get(known.method) if known is not None else None
    if known is None or method is None:
        return f" --previous {quoted(source)}"
    chosen = f" --method {method.name}" if method.name != AggregateOptions().method else ""
    if known.quorum is not None:
        chosen += f" --quorum {known.quorum:g}"
    return chosen + (f" --previous {quoted(source)}" if method.uses_previous else "")
