"""`fedlora init`: round 0."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fedlora_cli.cli.arguments import Folders, Like, Null, listed
from fedlora_cli.cli.command import Only, command, heavy_imports
from fedlora_cli.cli.console import Printing, errors, print_start
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.distribution import init_view
from fedlora_cli.reports.distribution import InitReport
from fedlora_cli.rounds.options import InitOptions


@partial(command, first=("base", "output", "ranks", "like"))
def init(
    *,
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Base model: a folder, or a name on the hub.")
    ],
    output: Folders,
    like: Like = None,
    options: InitOptions,
    null: Null = False,
    printing: Annotated[Printing, Only(verbose="Show every adapter and every module.")],
) -> None:
    """Only the configuration of the base model is read, and heads that are trained in full.

    Examples:

    fedlora init meta-llama/Llama-3.1-8B -o round-00 --ranks 4,8,16

    fedlora init base -o round-00 --ranks 2,8 --target-modules q_proj,v_proj --alpha 16

    fedlora init base -o round-00 --like clients
    """
    clients = listed(like or [], null=null)
    with heavy_imports():
        from fedlora_cli.rounds.initialize import initialize as run

    with progress_on(errors(), shown=not printing.quiet) as stage:
        report = run(base, output, clients, options, stage)
    view = partial(init_view, details=printing.verbose)
    print_start(printing, report, InitReport.to_dict, view, "fedlora aggregate CLIENTS -o global")
