"""`fedlora aggregate`: the main job."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedlora_cli.aggregation.options import Basis, Dtype, Missing, Options, Split
from fedlora_cli.cli.shared import (
    Debug,
    Json,
    Quiet,
    Verbose,
    errors,
    guarded,
    heavy_imports,
    results,
    say,
)
from fedlora_cli.errors import UsageError
from fedlora_cli.methods import METHODS
from fedlora_cli.render.document import aggregate_document, to_json
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.terminal import on_terminal
from fedlora_cli.render.views.aggregate import aggregate_view

_EARLIER = "Previous rounds"
_INFLUENCE = "Influence"
_OUTPUT = "Output"


def _option(*flags: str, help: str, panel: str | None = None, **kwargs: Any) -> Any:
    """An option in one of the panels of the help."""
    if panel is not None:
        kwargs["rich_help_panel"] = panel
    return typer.Option(*flags, help=help, show_default=kwargs.pop("show_default", False), **kwargs)


@guarded
def aggregate(
    clients: Annotated[
        list[str],
        typer.Argument(
            metavar="CLIENTS",
            help="Adapter folders, or a folder of adapter folders, or - for a list on stdin.",
        ),
    ],
    output: Annotated[
        Path, _option("--output", "-o", metavar="DIR", help="Write the global adapter here.")
    ],
    method: Annotated[
        str, _option("--method", "-m", help=f"One of: {', '.join(METHODS)}.", show_default=True)
    ] = "raflora",
    rank: Annotated[
        int | None, _option("--rank", "-r", help="Rank of the output; default: the largest.")
    ] = None,
    energy: Annotated[
        float | None,
        _option("--energy", help="Instead: the smallest rank that keeps this share, as 0.99."),
    ] = None,
    samples: Annotated[
        Path | None,
        _option(
            "--samples",
            metavar="FILE",
            help="Sample counts: JSON object or CSV `client,samples`; default: from the folders.",
        ),
    ] = None,
    verify: Annotated[
        bool, _option("--verify", help="Read the files back and compare every module.")
    ] = False,
    previous: Annotated[
        Path | None,
        _option(
            "--previous", panel=_EARLIER, metavar="DIR", help="The global adapter of last round."
        ),
    ] = None,
    before_previous: Annotated[
        Path | None,
        _option("--before-previous", panel=_EARLIER, metavar="DIR", help="The one before that."),
    ] = None,
    momentum: Annotated[
        float,
        _option("--momentum", panel=_EARLIER, help="β: add β times the step between the two."),
    ] = 0.0,
    quorum: Annotated[
        float | None,
        _option(
            "--quorum",
            panel=_INFLUENCE,
            help="Share of all samples below which the holders of a rank index do not own it.",
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        _option("--max-rank", panel=_INFLUENCE, help="Refuse clients of a higher rank."),
    ] = None,
    basis: Annotated[
        Basis,
        _option(
            "--basis",
            panel=_INFLUENCE,
            show_default=True,
            help="Rank index as stored, or by singular value: for adapters of other origin.",
        ),
    ] = "stored",
    missing: Annotated[
        Missing,
        _option(
            "--missing",
            panel=_INFLUENCE,
            show_default=True,
            help="A module that a client lacks: the others share its weight, or it counts as zero.",
        ),
    ] = "renormalize",
    base: Annotated[
        str | None,
        _option("--base", panel=_OUTPUT, help="The base model, however the clients name it."),
    ] = None,
    split: Annotated[
        Split,
        _option(
            "--split",
            panel=_OUTPUT,
            show_default=True,
            help="Singular values into both factors, B (left) or A (right).",
        ),
    ] = "balanced",
    dtype: Annotated[
        Dtype | None, _option("--dtype", panel=_OUTPUT, help="Default: that of the clients.")
    ] = None,
    device: Annotated[
        str, _option("--device", panel=_OUTPUT, show_default=True, help="Where to compute.")
    ] = "cpu",
    jobs: Annotated[
        int, _option("--jobs", "-j", panel=_OUTPUT, help="Modules at a time; default: all cores.")
    ] = 0,
    dry_run: Annotated[
        bool, _option("--dry-run", "-n", panel=_OUTPUT, help="Read headers only, write nothing.")
    ] = False,
    force: Annotated[
        bool, _option("--force", "-f", panel=_OUTPUT, help="Replace an existing adapter.")
    ] = False,
    null: Annotated[
        bool, _option("--null", "-0", panel=_OUTPUT, help="The list on stdin is NUL-separated.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Aggregate client adapters of different ranks into one global PEFT adapter.

    Examples:

    fedlora aggregate round-01 -o global

    fedlora aggregate round-02 -o global-02 --previous global --verify

    fedlora aggregate a b c -o global --samples counts.csv --method flexlora
    """
    options = Options(
        method=method,
        rank=rank,
        energy=energy,
        samples=samples,
        base=base,
        previous=previous,
        before_previous=before_previous,
        momentum=momentum,
        quorum=quorum,
        max_rank=max_rank,
        basis=basis,
        missing=missing,
        split=split,
        dtype=dtype,
        device=device,
        jobs=jobs,
        verify=verify,
        force=force,
        dry_run=dry_run,
    )
    paths = _paths(clients, null=null)
    # Not before the options are known to be good.
    with heavy_imports():
        from fedlora_cli.rounds.aggregate import aggregate as run

    console = errors()
    with progress_on(console, shown=not quiet) as stage:
        report = run(paths, output, options, stage)
    if not quiet:
        for warning in report.warnings:
            say(console, "warning", warning, "yellow")
    if json:
        typer.echo(to_json(aggregate_document(report)), nl=False)
    elif not quiet:
        console = results()
        view = aggregate_view(report, modules=verbose)
        console.print(on_terminal(view, plain=console.options.ascii_only))
    if not quiet:
        _say_what_next(errors(), output, dry_run=dry_run)


def _paths(clients: list[str], *, null: bool) -> list[Path]:
    """The folders named; - stands for a list on standard input."""
    if "-" not in clients:
        return [Path(client) for client in clients]
    if clients != ["-"]:
        raise UsageError("CLIENTS", "- beside other folders", "put all of them into the list")
    # Paths are bytes: in any encoding, and with no standard input at all.
    content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    if b"\0" in content and not null:
        raise UsageError("standard input", "a NUL-separated list", "give --null")
    listed = [item for item in content.split(b"\0" if null else b"\n") if item.strip()]
    if not listed:
        raise UsageError("standard input", "no folders in the list", "pipe one path per line")
    return [Path(os.fsdecode(item)) for item in listed]


def _say_what_next(console: Console, output: Path, *, dry_run: bool) -> None:
    folder = shlex.quote(str(output))
    if dry_run:
        say(console, "dry run", f"{folder} was not written", "bold")
        return
    say(console, "wrote", folder, "bold green")
    say(console, "next round", f"fedlora aggregate CLIENTS -o DIR --previous {folder}", "bold")
