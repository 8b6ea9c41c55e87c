"""`fedlora inspect`: what is in an adapter or a cohort, and every fault in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from fedlora_cli.cli.shared import (
    AdapterName,
    Base,
    Counts,
    Debug,
    Jobs,
    Json,
    Null,
    Quiet,
    Verbose,
    errors,
    guarded,
    heavy_imports,
    listed,
    option,
    quoted,
    say,
    show,
)
from fedlora_cli.errors import InputError
from fedlora_cli.files.locations import optional
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.inspect import inspect_views
from fedlora_cli.reports.document import inspect_document, to_json
from fedlora_cli.reports.inspect import InspectReport


@guarded
def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS",
            help="Adapter folders, or a folder of adapter folders, or - for a list on stdin.",
        ),
    ],
    samples: Counts = None,
    base: Base = None,
    adapter: AdapterName = None,
    values: Annotated[
        bool, option("--values", help="Read every tensor: are all values finite?")
    ] = False,
    jobs: Jobs = 0,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show what is in adapters, how they differ, and every fault that aggregate would meet.

    Examples:

    fedlora inspect global

    fedlora inspect round-01 --values

    fedlora inspect round-01 --json | jq -r '.faults[].where'
    """
    places = listed(paths, null=null)
    with heavy_imports():
        from fedlora_cli.analysis.inspection.inspect import inspect as run

        if values:
            import fedlora_cli.clients.tensor_checks  # noqa: F401 (torch comes with it)

    console = errors()
    with progress_on(console, shown=not quiet) as stage:
        report = run(
            places, optional(samples), base, adapter=adapter, values=values, jobs=jobs, stage=stage
        )
    if json:
        typer.echo(to_json(inspect_document(report)), nl=False)
    elif not quiet:
        for number, view in enumerate(inspect_views(report, modules=verbose)):
            if number:
                typer.echo()
            show(view)
    if not quiet:
        for note in report.notes:
            say(console, "note", note, "yellow")
    for fault in report.faults:
        say(console, "error", f"{fault.where}: {fault.found}; {fault.cure}", "bold red")
    if report.faults:
        raise typer.Exit(InputError.exit_code)
    if not quiet and console.is_terminal:
        _say_what_next(console, report, paths)


def _say_what_next(console: Console, report: InspectReport, paths: Sequence[str]) -> None:
    named = "CLIENTS" if paths == ["-"] else quoted(*paths)
    if all(adapter.origin for adapter in report.adapters):
        say(console, "next", f"fedlora diagnose {named}", "bold")
    else:
        say(console, "next", f"fedlora aggregate {named} -o global", "bold")
