"""`fedlora aggregate`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_cli.aggregation.options import Basis, Dtype, Missing, Options, Split
from fedlora_cli.cli.shared import (
    Clients,
    Counts,
    Debug,
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
    warn,
)
from fedlora_cli.methods import METHODS
from fedlora_cli.render.document import aggregate_document, to_json
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.aggregate import aggregate_view

_EARLIER = "Previous rounds"
_INFLUENCE = "Influence"
_OUTPUT = "Output"


@guarded
def aggregate(
    clients: Clients,
    output: Annotated[
        Path, option("--output", "-o", metavar="DIR", help="Write the global adapter here.")
    ],
    method: Annotated[
        str, option("--method", "-m", help=f"One of: {', '.join(METHODS)}.", show_default=True)
    ] = "raflora",
    rank: Annotated[
        int | None, option("--rank", "-r", help="Rank of the output; default: the largest.")
    ] = None,
    energy: Annotated[
        float | None,
        option("--energy", help="Instead: the smallest rank that keeps this share, as 0.99."),
    ] = None,
    samples: Counts = None,
    verify: Annotated[
        bool, option("--verify", help="Read the files back and compare every module.")
    ] = False,
    previous: Annotated[
        Path | None,
        option(
            "--previous", panel=_EARLIER, metavar="DIR", help="The global adapter of last round."
        ),
    ] = None,
    before_previous: Annotated[
        Path | None,
        option("--before-previous", panel=_EARLIER, metavar="DIR", help="The one before that."),
    ] = None,
    rounds: Annotated[
        Path | None,
        option(
            "--rounds",
            panel=_EARLIER,
            metavar="DIR",
            help="Instead: the folder of all rounds, in which both are found by their numbers.",
        ),
    ] = None,
    momentum: Annotated[
        float,
        option("--momentum", panel=_EARLIER, help="β: add β times the step between the two."),
    ] = 0.0,
    quorum: Annotated[
        float | None,
        option(
            "--quorum",
            panel=_INFLUENCE,
            help="Share of all samples below which the holders of a rank index do not own it.",
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        option("--max-rank", panel=_INFLUENCE, help="Refuse clients of a higher rank."),
    ] = None,
    basis: Annotated[
        Basis,
        option(
            "--basis",
            panel=_INFLUENCE,
            show_default=True,
            help="Rank index as stored, or by singular value: for adapters of other origin.",
        ),
    ] = "stored",
    missing: Annotated[
        Missing,
        option(
            "--missing",
            panel=_INFLUENCE,
            show_default=True,
            help="A module that a client lacks: the others share its weight, or it counts as zero.",
        ),
    ] = "renormalize",
    base: Annotated[
        str | None,
        option("--base", panel=_OUTPUT, help="The base model, however the clients name it."),
    ] = None,
    split: Annotated[
        Split,
        option(
            "--split",
            panel=_OUTPUT,
            show_default=True,
            help="Singular values into both factors, B (left) or A (right).",
        ),
    ] = "balanced",
    dtype: Annotated[
        Dtype | None, option("--dtype", panel=_OUTPUT, help="Default: that of the clients.")
    ] = None,
    device: Annotated[
        str, option("--device", panel=_OUTPUT, show_default=True, help="Where to compute.")
    ] = "cpu",
    jobs: Annotated[
        int, option("--jobs", "-j", panel=_OUTPUT, help="Modules at a time; default: all cores.")
    ] = 0,
    dry_run: Annotated[
        bool, option("--dry-run", "-n", panel=_OUTPUT, help="Read headers only, write nothing.")
    ] = False,
    force: Annotated[
        bool, option("--force", "-f", panel=_OUTPUT, help="Replace an existing adapter.")
    ] = False,
    null: Null = False,
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
        rounds=rounds,
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
    paths = listed(clients, null=null)
    # Not before the options are known to be good.
    with heavy_imports():
        from fedlora_cli.rounds.aggregate import aggregate as run

    console = errors()
    with progress_on(console, shown=not quiet) as stage:
        report = run(paths, output, options, stage)
    if not quiet:
        warn(report.warnings)
    if json:
        typer.echo(to_json(aggregate_document(report)), nl=False)
    elif not quiet:
        show(aggregate_view(report, modules=verbose))
    if not quiet:
        _say_what_next(errors(), output, options)


def _say_what_next(console: Console, output: Path, options: Options) -> None:
    folder = quoted(output)
    if options.dry_run:
        say(console, "dry run", f"{folder} was not written", "bold")
        return
    say(console, "wrote", folder, "bold green")
    method = METHODS[options.method]
    chosen = f" --method {method.name}" if method.name != Options().method else ""
    for flag, value in options.changed().items():
        if flag not in ("--previous", "--before-previous"):
            chosen += f" {flag} {quoted(value)}"
    if options.rounds is not None:
        chosen += f" --rounds {quoted(options.rounds)}"
    elif method.uses_previous or options.momentum:
        chosen += f" --previous {folder}"
    if options.momentum and options.rounds is None:
        chosen += f" --before-previous {quoted(options.previous)}"
    say(console, "next round", f"fedlora aggregate CLIENTS -o DIR{chosen}", "bold")
