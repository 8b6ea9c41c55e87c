"""`fedlora methods`: the table of methods with their papers."""

from __future__ import annotations

import typer

from fedlora_cli.cli.shared import Debug, Json, Quiet, guarded, show
from fedlora_cli.methods import METHODS
from fedlora_cli.render.views.methods import methods_view
from fedlora_cli.reports.document import methods_document, to_json


@guarded
def methods(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the aggregation methods with their weights and papers.

    Example: fedlora methods --json
    """
    if json:
        typer.echo(to_json(methods_document(METHODS.values())), nl=False)
    elif not quiet:
        show(methods_view(METHODS.values()))
