"""`fedlora aggregate`: client adapters in, one global adapter out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.target import vllm_rank
from fedlora_cli.cli.arguments import Clients, Null, listed
from fedlora_cli.cli.command import command, heavy_imports
from fedlora_cli.cli.console import Printing, errors, print_result, quoted, say, warn
from fedlora_cli.execution.cluster import ClusterWarning
from fedlora_cli.methods import find
from fedlora_cli.remote import Location
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.aggregate import aggregate_view
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.rounds.preparation import prepare


@command
def aggregate(
    *,
    clients: Clients,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the global adapter.")
    ],
    options: AggregateOptions,
    null: Null = False,
    printing: Printing,
) -> None:
    """Examples:

    fedlora aggregate round-01 -o global

    fedlora aggregate round-02 -o global-02 --previous global --verify

    fedlora aggregate a b c -o global --samples counts.csv --method flexlora
    """
    task = prepare(listed(clients, null=null), output, options)
    # Torch is loaded only after all options and headers are known to be good.
    with heavy_imports():
        from fedlora_cli.rounds.aggregate import execute

    loud = not printing.quiet
    with _cluster_warnings(shown=loud), progress_on(errors(), shown=loud) as stage:
        report = execute(task, stage)
    # Clients that were left out are shown even with --quiet.
    warn([f"{client.name} left out: {client.reason}" for client in report.left_out])
    if loud:
        warn(report.warnings)
    view = partial(aggregate_view, modules=printing.verbose, explain=options.explain)
    print_result(printing, report, AggregateReport.to_dict, view)
    if loud:
        _advise(task.output, options)
        if options.target == "vllm" and report.rank is not None:
            say("vllm", f"serve with --enable-lora --max-lora-rank {vllm_rank(report.rank)}")


@contextmanager
def _cluster_warnings(*, shown: bool) -> Iterator[None]:
    """Show the warnings of a cluster like all others."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ClusterWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, ClusterWarning):
                others(message, category, *place, **more)
            elif shown:
                warn([str(message)])

        warnings.showwarning = show
        yield


def _advise(output: Location, options: AggregateOptions) -> None:
    """Print where the adapter is, and the command for the next round."""
    folder = quoted(output)
    if options.dry_run:
        say("dry run", f"{folder} was not written; values and copies were not checked")
        return
    say("wrote", folder, "bold green")
    method = find(options.method)
    chosen = f" --method {method.name}" if method.name != AggregateOptions().method else ""
    for flag, value in options.changed().items():
        if flag not in ("--previous", "--before-previous"):
            chosen += f" {flag}" if value is True else f" {flag} {quoted(value)}"
    if options.target is not None:
        chosen += f" --target {options.target}"
    if options.rounds is not None:
        chosen += f" --rounds {quoted(options.rounds)}"
    elif method.uses_previous or options.momentum:
        chosen += f" --previous {folder}"
    if options.momentum and options.rounds is None:
        chosen += f" --before-previous {quoted(options.previous)}"
    say("next round", f"fedlora aggregate CLIENTS -o DIR{chosen}")
