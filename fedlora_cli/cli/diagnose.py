"""`fedlora diagnose`: rank collapse in an adapter, in the clients of a round, or over rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import typer

from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.verdict import VERDICTS
from fedlora_cli.cli.arguments import Null, Paths, listed
from fedlora_cli.cli.command import FINDING, command, heavy_imports
from fedlora_cli.cli.console import Printing, errors, quoted, say
from fedlora_cli.cli.pictures import Pictures, print_with_pictures
from fedlora_cli.errors import UsageError
from fedlora_cli.options import SHARE, check_options, option
from fedlora_cli.remote import Location
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.diagnose import diagnose_view
from fedlora_cli.reports.diagnose import DiagnoseReport, Verdict

_PANEL = "For pipelines"

#: Verdicts that can end a pipeline, from the best to the worst.
_FAILING = VERDICTS[1:]

#: Folders that the advice repeats.
_NAMED = 3


def _verdict(flag: str, text: str) -> Verdict:
    words = text.replace("-", " ").lower()
    for verdict in _FAILING:
        if verdict == words:
            return verdict
    raise UsageError(flag, f"no verdict {text}", f"use {', '.join(_FAILING)}")


@dataclass(frozen=True)
class Limits:
    """The limits above which the command ends with exit code 1. Raises UsageError."""

    fail_above: float | None = option(
        None,
        "Exit with 1 if ρ is above this limit.",
        panel=_PANEL,
        metavar="RHO",
        check=SHARE,
    )
    fail_on: Verdict | None = option(
        None,
        f"Exit with 1 if the verdict is this or worse: {', '.join(_FAILING)}.",
        panel=_PANEL,
        metavar="VERDICT",
        words=lambda: [verdict.replace(" ", "-") for verdict in _FAILING],
        text=str,
        parse=_verdict,
    )

    def __post_init__(self) -> None:
        check_options(self)

    def finding(self, report: DiagnoseReport) -> str | None:
        """The limit that the report exceeds. A limit without a value to compare is an error, never
        a pass: raises UsageError.
        """
        if self.fail_above is not None:
            if report.energy_ratio is None:
                raise UsageError("--fail-above", "ρ is not known", "give --shared-rank")
            if report.energy_ratio > self.fail_above:
                return f"ρ = {report.energy_ratio:.4f} is above {self.fail_above:g}"
        if self.fail_on is not None:
            if report.verdict is None:
                raise UsageError("--fail-on", "there is no verdict", report.reason)
            if VERDICTS.index(report.verdict) >= VERDICTS.index(self.fail_on):
                return f"{report.verdict}: {report.reason}"
        return None


@partial(command, first=("paths", "shared_rank"))
def diagnose(
    *,
    paths: Paths,
    options: DiagnoseOptions,
    limits: Limits,
    pictures: Pictures,
    null: Null = False,
    printing: Printing,
) -> None:
    """PATHS are an adapter, the clients of a round, or global adapters in order of rounds.

    Examples:

    fedlora diagnose global

    fedlora diagnose round-01

    fedlora diagnose globals/round-* --fail-on collapsing --plot rounds.png
    """
    folders = listed(paths, null=null)
    with heavy_imports():
        from fedlora_cli.analysis.diagnosis.diagnose import diagnose as run

    with progress_on(errors(), shown=not printing.quiet) as stage:
        report = run(folders, options, stage)
    print_with_pictures(
        "diagnose",
        report,
        printing,
        pictures,
        DiagnoseReport.to_dict,
        partial(diagnose_view, modules=printing.verbose),
        partial(diagnose_view, modules=True),
    )
    finding = limits.finding(report)
    if not printing.quiet:
        say("next", _next(report, folders))
    if finding is not None:
        say("finding", finding, "bold red")
        raise typer.Exit(FINDING)


def _next(report: DiagnoseReport, folders: list[Location]) -> str:
    """The command to run next."""
    if report.subject == "clients":
        shown = quoted(*folders[:_NAMED])
        return f"fedlora predict {shown}{' ...' if len(folders) > _NAMED else ''}"
    if report.verdict in ("at risk", "collapsing", "collapsed"):
        made = f"these were made by {report.methods[-1]}; " if report.methods[-1] else ""
        return f"{made}fedlora compare CLIENTS --previous DIR shows what other methods keep"
    return "fedlora diagnose CLIENTS shows the ranks and the energy of each client"
