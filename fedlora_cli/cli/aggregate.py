"""`fedlora aggregate`: the main job."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedlora_cli.aggregation.options import (
    AggregateOptions,
    BadClient,
    Basis,
    Dora,
    Dtype,
    Missing,
    Robust,
    Split,
    Target,
)
from fedlora_cli.cli.shared import (
    AdapterName,
    ClientsArgument,
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
from fedlora_cli.clients.sample_counts import MAX_RATIO
from fedlora_cli.errors import UsageError
from fedlora_cli.execution.cluster import ClusterWarning
from fedlora_cli.files.locations import optional
from fedlora_cli.formats.serving import VLLM_RANKS
from fedlora_cli.methods import METHODS
from fedlora_cli.remote import Location
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.aggregate import aggregate_view
from fedlora_cli.reports.document import aggregate_document, to_json
from fedlora_cli.rounds.preparation import prepare

_WHO = "Who takes part"
_EARLIER = "Previous rounds"
_INFLUENCE = "Influence"
_OUTPUT = "Output"


@guarded
def aggregate(
    clients: ClientsArgument,
    output: Annotated[
        str, option("--output", "-o", metavar="DIR", help="Write the global adapter here.")
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
    adapter: AdapterName = None,
    verify: Annotated[
        bool, option("--verify", help="Read the files back and compare every module.")
    ] = False,
    on_bad_client: Annotated[
        BadClient,
        option(
            "--on-bad-client",
            panel=_WHO,
            show_default=True,
            help="Refuse everything, or leave the client out; skip reads all tensors once more.",
        ),
    ] = "refuse",
    min_clients: Annotated[
        int,
        option(
            "--min-clients", panel=_WHO, show_default=True, help="How many must be left, or none."
        ),
    ] = 1,
    max_count_ratio: Annotated[
        float,
        option(
            "--max-count-ratio",
            panel=_WHO,
            show_default=True,
            help="A client's own sample count, at most so many times the median of all.",
        ),
    ] = MAX_RATIO,
    allow_copies: Annotated[
        bool,
        option("--allow-copies", panel=_WHO, help="Count clients with the same weights, each."),
    ] = False,
    previous: Annotated[
        str | None,
        option(
            "--previous", panel=_EARLIER, metavar="DIR", help="The global adapter of last round."
        ),
    ] = None,
    before_previous: Annotated[
        str | None,
        option("--before-previous", panel=_EARLIER, metavar="DIR", help="The one before that."),
    ] = None,
    rounds: Annotated[
        str | None,
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
    max_weight: Annotated[
        float | None,
        option(
            "--max-weight",
            panel=_INFLUENCE,
            help="Largest weight of one client at any rank index; the others share what is cut.",
        ),
    ] = None,
    clip_norm: Annotated[
        str | None,
        option(
            "--clip-norm",
            panel=_INFLUENCE,
            metavar="C|auto",
            help="Scale larger updates down to this norm; auto: twice the median.",
        ),
    ] = None,
    robust: Annotated[
        Robust | None,
        option(
            "--robust",
            panel=_INFLUENCE,
            help="Trust clients by how far they are from the others.",
        ),
    ] = None,
    attackers: Annotated[
        int | None,
        option("--attackers", panel=_INFLUENCE, help="How many clients Multi-Krum leaves out."),
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
    dora: Annotated[
        Dora,
        option(
            "--dora",
            panel=_INFLUENCE,
            show_default=True,
            help="Clients that use DoRA: refused, or directions and magnitudes averaged apart.",
        ),
    ] = "refuse",
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
        Dtype | None, option("--dtype", panel=_OUTPUT, help="Default: that of most samples.")
    ] = None,
    target: Annotated[
        Target | None,
        option("--target", panel=_OUTPUT, help="Refuse what this server could not load."),
    ] = None,
    device: Annotated[
        str,
        option(
            "--device",
            panel=_OUTPUT,
            show_default=True,
            help="Where to compute: cpu, cuda, cuda:N or auto.",
        ),
    ] = "cpu",
    jobs: Annotated[
        int, option("--jobs", "-j", panel=_OUTPUT, help="Modules at a time; default: all cores.")
    ] = 0,
    cluster: Annotated[
        str | None,
        option(
            "--cluster",
            panel=_OUTPUT,
            metavar="ADDRESS",
            help="Compute on processes:N, on Dask as local:N, or at its tcp://HOST:PORT.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", "-n", panel=_OUTPUT, help="Read headers only, write nothing.")
    ] = False,
    explain: Annotated[
        bool,
        option("--explain", panel=_OUTPUT, help="Show how every module is computed, and why so."),
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
    options = AggregateOptions(
        method=method,
        rank=rank,
        energy=energy,
        samples=optional(samples),
        base=base,
        adapter=adapter,
        on_bad_client=on_bad_client,
        min_clients=min_clients,
        max_count_ratio=max_count_ratio,
        allow_copies=allow_copies,
        previous=optional(previous),
        before_previous=optional(before_previous),
        rounds=optional(rounds),
        momentum=momentum,
        quorum=quorum,
        max_rank=max_rank,
        max_weight=max_weight,
        clip_norm=_clip(clip_norm),
        robust=robust,
        attackers=attackers,
        basis=basis,
        missing=missing,
        dora=dora,
        split=split,
        dtype=dtype,
        target=target,
        device=device,
        jobs=jobs,
        cluster=cluster,
        verify=verify,
        force=force,
        explain=explain,
        dry_run=dry_run,
    )
    paths = listed(clients, null=null)
    task = prepare(paths, output, options)
    # Not before the options and all headers are known to be good.
    with heavy_imports():
        from fedlora_cli.rounds.aggregate import execute

    console = errors()
    with _clusters_told(shown=not quiet), progress_on(console, shown=not quiet) as stage:
        report = execute(task, stage)
    # Even with --quiet: nobody is left out in silence.
    warn([f"{one.name} left out: {one.reason}" for one in report.left_out])
    if not quiet:
        warn(report.warnings)
    if json:
        typer.echo(to_json(aggregate_document(report)), nl=False)
    elif not quiet:
        show(aggregate_view(report, modules=verbose, explain=explain))
    if not quiet:
        _say_what_next(errors(), task.output, options)
        if options.target == "vllm" and report.rank is not None:
            least = next(rank for rank in VLLM_RANKS if rank >= report.rank)
            say(errors(), "vllm", f"serve with --enable-lora --max-lora-rank {least}", "bold")


@contextmanager
def _clusters_told(*, shown: bool) -> Iterator[None]:
    """What is odd about a cluster is said like every other warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ClusterWarning)
        others = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, ClusterWarning):
                others(message, category, *place, **more)
            elif shown:
                warn([str(message)])

        warnings.showwarning = tell
        yield


def _clip(text: str | None) -> float | Literal["auto"] | None:
    if text is None:
        return None
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise UsageError(
            "--clip-norm", f"{text[:40]!r} is no number", "give one, or auto"
        ) from None


def _say_what_next(console: Console, output: Location, options: AggregateOptions) -> None:
    folder = quoted(output)
    if options.dry_run:
        unseen = "values and copies were not looked at"
        say(console, "dry run", f"{folder} was not written; {unseen}", "bold")
        return
    say(console, "wrote", folder, "bold green")
    method = METHODS[options.method]
    chosen = f" --method {method.name}" if method.name != AggregateOptions().method else ""
    for flag, value in options.changed().items():
        if flag not in ("--previous", "--before-previous"):
            chosen += f" {flag}" if value is True else f" {flag} {quoted(value)}"
    if options.target is not None:
        chosen += f" --target {options.target}"
    if options.rounds is not None:
        chosen += f" --rounds {quoted(options.rounds)}"
    elif method.uses_previous or options.momentum:
        chosen += f" --previous {folder}"
    if options.momentum and options.rounds is None:
        chosen += f" --before-previous {quoted(options.previous)}"
    say(console, "next round", f"fedlora aggregate CLIENTS -o DIR{chosen}", "bold")
