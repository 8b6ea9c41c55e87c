"""`fedlora distribute`: the global adapter at every client's rank."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.cli.arguments import Folders, Like, Null, listed
from fedlora_cli.cli.command import Only, command, heavy_imports
from fedlora_cli.cli.console import Printing, errors, print_start, quoted
from fedlora_cli.errors import InputError
from fedlora_cli.files.locations import location
from fedlora_cli.methods import known
from fedlora_cli.remote import Location
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.distribution import distribute_view
from fedlora_cli.reports.distribution import DistributeReport
from fedlora_cli.reports.provenance import read_provenance
from fedlora_cli.rounds.options import DistributeOptions


@partial(command, first=("source", "output", "like", "adapter"))
def distribute(
    *,
    source: Annotated[str, typer.Argument(metavar="GLOBAL", help="Folder of the global adapter.")],
    output: Folders,
    like: Like = None,
    options: DistributeOptions,
    null: Null = False,
    printing: Annotated[Printing, Only(verbose="Show every adapter and every module.")],
) -> None:
    """Examples:

    fedlora distribute global -o round-02 --like round-01

    fedlora distribute global -o by-rank --rank 4,8,16
    """
    adapter = location(source)
    clients = listed(like or [], null=null)
    with heavy_imports():
        from fedlora_cli.rounds.distribute import distribute as run

    with progress_on(errors(), shown=not printing.quiet) as stage:
        report = run(adapter, output, clients, options, stage)
    view = partial(distribute_view, details=printing.verbose)
    following = f"fedlora aggregate CLIENTS -o DIR{_next_options(adapter)}"
    print_start(printing, report, DistributeReport.to_dict, view, following)


def _next_options(source: Location) -> str:
    """The options of `aggregate` for the method of the global adapter, as far as its report can be
    read.
    """
    provenance = None
    with suppress(InputError):
        provenance = read_provenance(source)
    method = None if provenance is None else known(provenance.method)
    if provenance is None or method is None:
        return f" --previous {quoted(source)}"
    chosen = f" --method {method.name}" if method.name != AggregateOptions().method else ""
    if provenance.quorum is not None:
        chosen += f" --quorum {provenance.quorum:g}"
    return chosen + (f" --previous {quoted(source)}" if method.uses_previous else "")
