"""`fedlora diagnose`: rank collapse, of one adapter, of a cohort, of a series of rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.verdict import VERDICTS
from fedlora_cli.cli.pictures import Html, Plot, check_pictures, write_pictures
from fedlora_cli.cli.shared import (
    FINDING,
    AdapterName,
    Base,
    Counts,
    Debug,
    Jobs,
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
from fedlora_cli.errors import UsageError
from fedlora_cli.files.locations import optional
from fedlora_cli.remote import Location
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.diagnose import diagnose_view
from fedlora_cli.reports.diagnose import DiagnoseReport, Verdict
from fedlora_cli.reports.document import diagnose_document, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIPELINES = "For pipelines"

#: Folders that advice repeats.
_NAMED = 3


@guarded
def diagnose(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS",
            help="An adapter, the clients of a round, global adapters in order, a folder of them.",
        ),
    ],
    shared_rank: Annotated[
        int | None,
        option("--shared-rank", help="Smallest rank of the clients; default: as the files say."),
    ] = None,
    subject: Annotated[
        Literal["clients", "rounds"] | None,
        option("--as", help="What they are, where the files do not tell."),
    ] = None,
    samples: Counts = None,
    base: Base = None,
    adapter: AdapterName = None,
    similarity: Annotated[
        bool | None,
        option(
            "--similarity/--no-similarity",
            help="Compare the clients pairwise; default: up to 100 of them.",
        ),
    ] = None,
    fail_above: Annotated[
        float | None,
        option("--fail-above", panel=_PIPELINES, metavar="RHO", help="Exit 1 if ρ is above it."),
    ] = None,
    fail_on: Annotated[
        str | None,
        option(
            "--fail-on",
            panel=_PIPELINES,
            metavar="VERDICT",
            help=f"Exit 1 if it is that bad or worse: {', '.join(VERDICTS[1:])}.",
        ),
    ] = None,
    plot: Plot = None,
    html: Html = None,
    jobs: Jobs = 0,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say whether adapters collapse in rank, why, and how fast.

    Examples:

    fedlora diagnose global

    fedlora diagnose round-01

    fedlora diagnose globals/round-* --fail-on collapsing --plot rounds.png
    """
    counts = optional(samples)
    options = DiagnoseOptions(subject, shared_rank, counts, base, similarity, jobs, adapter)
    worst = _check_limits(fail_above, fail_on)
    check_pictures(plot, html)
    folders = listed(paths, null=null)
    with heavy_imports():
        from fedlora_cli.analysis.diagnosis.diagnose import diagnose as run

    console = errors()
    with progress_on(console, shown=not quiet) as stage:
        report = run(folders, options, stage)
    if not quiet:
        warn(report.warnings)
    written = write_pictures(
        plot, html, lambda: _draw(report), lambda: diagnose_view(report, modules=True)
    )
    if json:
        typer.echo(to_json(diagnose_document(report)), nl=False)
    elif not quiet:
        show(diagnose_view(report, modules=verbose))
    found = _beyond(report, fail_above, worst)
    if not quiet:
        for path in written:
            say(console, "wrote", str(path), "bold green")
        say(console, "next", _next(report, folders), "bold")
    if found is not None:
        say(console, "finding", found, "bold red")
        raise typer.Exit(FINDING)


def _next(report: DiagnoseReport, folders: list[Location]) -> str:
    """The command that a person would most likely want now."""
    if report.subject == "clients":
        shown = quoted(*folders[:_NAMED])
        return f"fedlora predict {shown}{' ...' if len(folders) > _NAMED else ''}"
    if report.verdict in ("at risk", "collapsing", "collapsed"):
        made = f"these were made by {report.methods[-1]}; " if report.methods[-1] else ""
        return f"{made}fedlora compare CLIENTS --previous DIR shows what other methods keep"
    return "fedlora diagnose CLIENTS shows who holds and who brings what"


def _draw(report: DiagnoseReport) -> Figure:
    from fedlora_cli.render.figures.diagnose import diagnose_figure

    return diagnose_figure(report)


def _check_limits(fail_above: float | None, fail_on: str | None) -> Verdict | None:
    """The verdict from which on to fail. Raises UsageError."""
    if fail_above is not None and not 0 <= fail_above <= 1:
        raise UsageError("--fail-above", f"{fail_above} is out of range", "ρ is from 0 to 1")
    if fail_on is None:
        return None
    named = fail_on.replace("-", " ").lower()
    match = next((verdict for verdict in VERDICTS[1:] if verdict == named), None)
    if match is None:
        raise UsageError("--fail-on", f"no verdict {fail_on}", f"use {', '.join(VERDICTS[1:])}")
    return match


def _beyond(report: DiagnoseReport, fail_above: float | None, worst: Verdict | None) -> str | None:
    """What exceeds the limits. A limit that nothing can be held to is an error, never a pass.

    Raises UsageError.
    """
    if fail_above is not None:
        if report.energy_ratio is None:
            raise UsageError("--fail-above", "ρ is not known", "give --shared-rank")
        if report.energy_ratio > fail_above:
            return f"ρ = {report.energy_ratio:.4f} is above {fail_above:g}"
    if worst is not None:
        if report.verdict is None:
            raise UsageError("--fail-on", "there is no verdict", report.reason)
        if VERDICTS.index(report.verdict) >= VERDICTS.index(worst):
            return f"{report.verdict}: {report.reason}"
    return None
