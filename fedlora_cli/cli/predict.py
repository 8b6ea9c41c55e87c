"""`fedlora predict`: a forecast from ranks and sample counts, before any training."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fedlora_cli.analysis.prediction.options import PredictOptions
from fedlora_cli.analysis.prediction.predict import predict as run
from fedlora_cli.cli.arguments import FOLDERS, Null
from fedlora_cli.cli.command import Only, command
from fedlora_cli.cli.console import Printing
from fedlora_cli.cli.forecast_clients import forecast_clients
from fedlora_cli.cli.pictures import Pictures, print_with_pictures
from fedlora_cli.render.views.predict import predict_view
from fedlora_cli.reports.predict import PredictReport


@command
def predict(
    *,
    clients: Annotated[
        list[str] | None, typer.Argument(metavar="CLIENTS", show_default=False, help=FOLDERS)
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", metavar="R,R,...", help="Rank of each client, instead of CLIENTS."),
    ] = None,
    cohort: Annotated[
        str | None,
        typer.Option(
            "--cohort",
            metavar="KxR[:N],...",
            help="Groups of K clients of rank R with N samples each, instead of CLIENTS.",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples",
            metavar="N,N,...|FILE",
            help="Sample counts: a number for each rank in --ranks, or for CLIENTS a JSON or CSV "
            "file.",
        ),
    ] = None,
    options: PredictOptions,
    pictures: Pictures,
    null: Null = False,
    printing: Annotated[Printing, Only(verbose="Show every method at every rank index.")],
) -> None:
    """Examples:

    fedlora predict --ranks 4,8,16 --samples 100,50,10

    fedlora predict --cohort 40x4,30x8,20x16,10x32 --participation 0.2

    fedlora predict round-01 --rounds 6 --plot forecast.png
    """
    known = forecast_clients(clients or [], ranks, cohort, samples, null=null)
    report = run(known.ranks, known.samples, options, known.warnings)
    print_with_pictures(
        "predict",
        report,
        printing,
        pictures,
        PredictReport.to_dict,
        partial(predict_view, details=printing.verbose),
        partial(predict_view, details=True),
    )
