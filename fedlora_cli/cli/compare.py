"""`fedlora compare`: all methods on the same clients, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedlora_cli.aggregation.options import AggregateOptions, Basis, Missing
from fedlora_cli.cli.pictures import Html, Plot, check_pictures, write_pictures
from fedlora_cli.cli.shared import (
    AdapterName,
    Base,
    ClientsArgument,
    Counts,
    Debug,
    Jobs,
    Json,
    Null,
    Quiet,
    errors,
    guarded,
    heavy_imports,
    listed,
    option,
    say,
    show,
    warn,
)
from fedlora_cli.files.locations import optional
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.compare import compare_view
from fedlora_cli.reports.compare import CompareReport
from fedlora_cli.reports.document import compare_document, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@guarded
def compare(
    clients: ClientsArgument,
    rank: Annotated[
        int | None, option("--rank", "-r", help="Rank of the output; default: the largest.")
    ] = None,
    samples: Counts = None,
    previous: Annotated[
        str | None, option("--previous", metavar="DIR", help="The global adapter of last round.")
    ] = None,
    quorum: Annotated[
        float | None, option("--quorum", help="One more row: raflora with this quorum.")
    ] = None,
    basis: Annotated[
        Basis, option("--basis", show_default=True, help="Rank index as stored, or by svd.")
    ] = "stored",
    missing: Annotated[
        Missing,
        option("--missing", show_default=True, help="What a module that a client lacks counts."),
    ] = "renormalize",
    base: Base = None,
    adapter: AdapterName = None,
    plot: Plot = None,
    html: Html = None,
    jobs: Jobs = 0,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what every method would make of the same clients. No adapter is written.

    Examples:

    fedlora compare round-01

    fedlora compare round-02 --previous global --quorum 0.2 --html methods.html
    """
    options = AggregateOptions(
        rank=rank,
        samples=optional(samples),
        previous=optional(previous),
        quorum=quorum,
        basis=basis,
        missing=missing,
        base=base,
        adapter=adapter,
        jobs=jobs,
    )
    check_pictures(plot, html)
    folders = listed(clients, null=null)
    with heavy_imports():
        from fedlora_cli.analysis.comparison.compare import compare as run

    console = errors()
    with progress_on(console, shown=not quiet) as stage:
        report = run(folders, options, stage)
    if not quiet:
        warn(report.warnings)
    written = write_pictures(plot, html, lambda: _draw(report), lambda: compare_view(report))
    if json:
        typer.echo(to_json(compare_document(report)), nl=False)
    elif not quiet:
        show(compare_view(report))
    if not quiet:
        for path in written:
            say(console, "wrote", str(path), "bold green")


def _draw(report: CompareReport) -> Figure:
    from fedlora_cli.render.figures.compare import compare_figure

    return compare_figure(report)
