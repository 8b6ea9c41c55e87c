"""`fedlora methods`: the table of methods with their papers."""

from __future__ import annotations

from typing import Annotated

from fedlora_cli.cli.command import Only, command
from fedlora_cli.cli.console import Printing, print_result, warn
from fedlora_cli.methods import listing
from fedlora_cli.render.views.methods import methods_view
from fedlora_cli.reports.document import methods_document


@command
def methods(*, printing: Annotated[Printing, Only("json", "quiet", "debug")]) -> None:
    """Example: fedlora methods --json"""
    listed, broken = listing()
    if not printing.quiet:
        warn([str(error) for error in broken.values()])
    print_result(printing, listed.values(), methods_document, methods_view)
