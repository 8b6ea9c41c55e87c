"""`fedlora compare`: all methods on the same clients, side by side."""

from __future__ import annotations

from typing import Annotated

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.cli.arguments import Clients, Null, listed
from fedlora_cli.cli.command import Only, command, heavy_imports
from fedlora_cli.cli.console import Printing, errors
from fedlora_cli.cli.pictures import Pictures, print_with_pictures
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.compare import compare_view
from fedlora_cli.reports.compare import CompareReport

_OPTIONS = ["rank", "samples", "previous", "quorum", "basis", "missing", "base", "adapter", "jobs"]


@command
def compare(
    *,
    clients: Clients,
    options: Annotated[
        AggregateOptions,
        Only(*_OPTIONS, quorum="Add a row: raflora with this quorum."),
    ],
    pictures: Pictures,
    null: Null = False,
    printing: Annotated[Printing, Only("json", "quiet", "debug")],
) -> None:
    """No adapter is written.

    Examples:

    fedlora compare round-01

    fedlora compare round-02 --previous global --quorum 0.2 --html methods.html
    """
    folders = listed(clients, null=null)
    with heavy_imports():
        from fedlora_cli.analysis.comparison.compare import compare as run

    with progress_on(errors(), shown=not printing.quiet) as stage:
        report = run(folders, options, stage)
    print_with_pictures(
        "compare", report, printing, pictures, CompareReport.to_dict, compare_view, compare_view
    )
