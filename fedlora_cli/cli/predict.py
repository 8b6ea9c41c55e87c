"""`fedlora predict`: what ranks and sample counts alone tell, before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedlora_cli.analysis.prediction.predict import predict as run
from fedlora_cli.cli.federation import given
from fedlora_cli.cli.pictures import Html, Plot, check_pictures, write_pictures
from fedlora_cli.cli.shared import (
    Debug,
    Json,
    Null,
    Quiet,
    errors,
    guarded,
    option,
    say,
    show,
    warn,
)
from fedlora_cli.render.views.predict import predict_view
from fedlora_cli.reports.document import predict_document, to_json
from fedlora_cli.reports.predict import PredictReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ASSUMED = "Assumptions"


@guarded
def predict(
    clients: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLIENTS",
            show_default=False,
            help="Adapter folders, or a folder of adapter folders, or - for a list on stdin.",
        ),
    ] = None,
    ranks: Annotated[
        str | None, option("--ranks", metavar="R,R,...", help="Instead: the rank of every client.")
    ] = None,
    cohort: Annotated[
        str | None,
        option(
            "--cohort",
            metavar="KxR[:N],...",
            help="Instead: groups of K clients of rank R, with N samples each.",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        option(
            "--samples",
            metavar="N,N,...|FILE",
            help="A count for every one of --ranks; or for CLIENTS a file, JSON or CSV.",
        ),
    ] = None,
    participation: Annotated[
        float,
        option(
            "--participation",
            "-p",
            panel=_ASSUMED,
            show_default=True,
            help="Share of the clients in every round.",
        ),
    ] = 1.0,
    start: Annotated[
        float | None,
        option("--start", panel=_ASSUMED, help="ρ of round 0; default: even over rank indices."),
    ] = None,
    quorum: Annotated[
        float | None,
        option("--quorum", panel=_ASSUMED, help="Also raflora with this quorum."),
    ] = None,
    plot: Plot = None,
    html: Html = None,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, option("--verbose", "-v", help="Show every method at every rank index.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Predict coverage, weights and rank collapse per method, before any training.

    Examples:

    fedlora predict --ranks 4,8,16 --samples 100,50,10

    fedlora predict --cohort 40x4,30x8,20x16,10x32 --participation 0.2

    fedlora predict round-01 --plot forecast.png
    """
    check_pictures(plot, html)
    federation = given(clients or [], ranks, cohort, samples, null=null)
    report = run(
        federation.ranks,
        federation.samples,
        participation=participation,
        start=start,
        quorum=quorum,
        warnings=federation.warnings,
    )

    if not quiet:
        warn(report.warnings)
    written = write_pictures(
        plot, html, lambda: _draw(report), lambda: predict_view(report, details=True)
    )
    if json:
        typer.echo(to_json(predict_document(report)), nl=False)
    elif not quiet:
        show(predict_view(report, details=verbose))
    if not quiet:
        for path in written:
            say(errors(), "wrote", str(path), "bold green")


def _draw(report: PredictReport) -> Figure:
    from fedlora_cli.render.figures.predict import predict_figure

    return predict_figure(report)
