"""`fedlora inspect`: the contents of adapters, and every fault in them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from fedlora_cli.analysis.inspection.options import InspectOptions
from fedlora_cli.cli.arguments import Null, Paths, listed
from fedlora_cli.cli.command import command, heavy_imports
from fedlora_cli.cli.console import Printing, errors, quoted, say, show
from fedlora_cli.errors import InputError
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.inspect import inspect_views
from fedlora_cli.reports.document import to_json
from fedlora_cli.reports.inspect import InspectReport


@command
def inspect(
    *, paths: Paths, options: InspectOptions, null: Null = False, printing: Printing
) -> None:
    """Examples:

    fedlora inspect global

    fedlora inspect round-01 --values

    fedlora inspect round-01 --json | jq -r '.faults[].where'
    """
    folders = listed(paths, null=null)
    with heavy_imports():
        from fedlora_cli.analysis.inspection.inspect import inspect as run

        if options.values:
            import fedlora_cli.clients.tensor_checks  # noqa: F401 (imports torch)

    with progress_on(errors(), shown=not printing.quiet) as stage:
        report = run(folders, options, stage)
    if printing.json:
        typer.echo(to_json(report.to_dict()), nl=False)
    elif not printing.quiet:
        for number, view in enumerate(inspect_views(report, modules=printing.verbose)):
            if number:
                typer.echo()
            show(view)
    if not printing.quiet:
        for note in report.notes:
            say("note", note, "yellow")
    for fault in report.faults:
        say("error", f"{fault.where}: {fault.found}; {fault.cure}", "bold red")
    if report.faults:
        raise typer.Exit(InputError.exit_code)
    if not printing.quiet and errors().is_terminal:
        say("next", _next(report, paths))


def _next(report: InspectReport, paths: Sequence[str]) -> str:
    """The command to run next."""
    folders = "CLIENTS" if paths == ["-"] else quoted(*paths)
    if all(adapter.origin for adapter in report.adapters):
        return f"fedlora diagnose {folders}"
    return f"fedlora aggregate {folders} -o global"
