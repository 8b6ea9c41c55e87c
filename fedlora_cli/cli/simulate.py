"""`fedlora simulate`: whole federations with real training, compared."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora_cli.cli.arms import arms_of
from fedlora_cli.cli.command import Given, Only, command, completing, heavy_imports
from fedlora_cli.cli.console import Printing, errors, quoted, say
from fedlora_cli.cli.forecast_clients import ranks_in
from fedlora_cli.cli.pictures import Pictures, print_with_pictures
from fedlora_cli.errors import UsageError
from fedlora_cli.files.interrupts import INTERRUPTED
from fedlora_cli.files.output import check_file, write_file
from fedlora_cli.methods import METHODS, names, outside_note
from fedlora_cli.options import whole_numbers
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.simulate import simulate_view
from fedlora_cli.reports.rows import to_csv
from fedlora_cli.reports.simulate import RoundRow, SimulateReport
from fedlora_cli.simulation.options import (
    COMPARISON,
    FEDERATION,
    Setting,
    SimulateOptions,
    Source,
    Split,
    Training,
)
from fedlora_cli.simulation.presets import NOTES, PRESETS

#: The methods whose clients freeze A, or merge an update into the base model.
_OTHERS = tuple(
    method.name
    for method in METHODS.values()
    if method.merge == "shared" or (method.merge, method.compress) == ("sum", "none")
)

_COMPARED = tuple(name for name in METHODS if name not in _OTHERS)

#: The options that fix the rows of each client.
_FIXED = ("clients_from", "client_column")

_PRESETS = ". ".join(f"{name}: {note}" for name, note in NOTES.items())


@command
def simulate(
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="RUN", help="Folder for all files; a run in it is continued."
        ),
    ],
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help=f"Options to begin with. {_PRESETS}.",
            autocompletion=completing(lambda: PRESETS),
        ),
    ] = next(iter(PRESETS)),
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME[:quorum=Q][:momentum=B]",
            help=f"Methods to compare, repeated or with commas: {', '.join(_COMPARED)}."
            + outside_note(),
            rich_help_panel=COMPARISON,
            autocompletion=completing(lambda: [name for name in names() if name not in _OTHERS]),
        ),
    ] = None,
    quorum: Annotated[
        str | None,
        typer.Option(
            "--quorum",
            metavar="Q,Q,...",
            help="Quorums to compare, with each method that has a quorum.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    momentum: Annotated[
        str | None,
        typer.Option(
            "--momentum",
            metavar="B,B,...",
            help="Momenta to compare, with each method that has a momentum.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    cohort: Annotated[
        str | None,
        typer.Option(
            "--cohort",
            metavar="KxR,...",
            help="Groups of K clients of rank R.",
            rich_help_panel=FEDERATION,
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            "--ranks",
            metavar="R,R,...",
            help="Rank of each client in the order of names, instead of --cohort.",
            rich_help_panel=FEDERATION,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write a CSV file with a row for each round of each arm, learning rate and seed.",
        ),
    ] = None,
    given: Annotated[dict[str, Any], Given(Setting, Split, Training, SimulateOptions, Source)],
    pictures: Pictures,
    printing: Annotated[Printing, Only(verbose="Show every round and the whole setting.")],
) -> None:
    """Every round leaves folders that the other commands read. The same command continues an
    interrupted run.

    Examples:

    fedlora simulate -o run

    fedlora simulate -o run -m flexlora,raflora --momentum 0,0.8 --lr 5e-4,1e-3 --plot run.png

    fedlora simulate -o run --cohort 8x4,4x16 -p 0.5 --quorum 0,0.5,1 --seeds 5
    """
    if csv is not None:
        check_file(csv, "--csv", (".csv",))
    _check_together(given)
    known = {"split": Split(), "ranks": ()} if given.keys() & set(_FIXED) else {}
    options: SimulateOptions = _with(_preset(preset), known | given | _ranks(cohort, ranks))
    options = replace(options, arms=arms_of(method or [], quorum, momentum, options.arms))
    with heavy_imports():
        from fedlora_cli.simulation.simulate import simulate as run
        from fedlora_cli.simulation.summary import round_rows

    try:
        with progress_on(errors(), shown=not printing.quiet) as stage:
            report = run(output, options, stage)
    except KeyboardInterrupt:
        found = f"interrupted; the same command continues from the last whole rounds in {output}"
        say("error", found, "bold red")
        raise typer.Exit(INTERRUPTED) from None
    if csv is not None:
        write_file(csv, to_csv(RoundRow, round_rows(output, options)).encode())
    print_with_pictures(
        "simulate",
        report,
        printing,
        pictures,
        SimulateReport.to_dict,
        partial(simulate_view, details=printing.verbose),
        partial(simulate_view, details=True, warnings=True),
        written=(output,) if csv is None else (output, csv),
    )
    if not printing.quiet and (next_ := _next(report)):
        say("next", next_)


def _check_together(given: dict[str, Any]) -> None:
    """Raises UsageError for two options that decide the rows of each client."""
    fixing = [(name, fixed) for fixed in _FIXED for name in ("dirichlet", "classes", "holdings")]
    for name, other in (("classes", "dirichlet"), _FIXED, *fixing):
        if name in given and other in given:
            flag, found = (f"--{each.replace('_', '-')}" for each in (name, other))
            raise UsageError(flag, f"given together with {found}", "give one of them")


def _preset(name: str) -> SimulateOptions:
    """Raises UsageError."""
    if name not in PRESETS:
        found = f"no preset is called {name}"
        raise UsageError("--preset", found, f"use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _with(known: Any, given: dict[str, Any]) -> Any:
    """The options with the given values, in the dataclasses within them too. Raises UsageError."""
    changes = {
        name: given[name] if name in given else _with(value, given)
        for name, value in vars(known).items()
        if name in given or is_dataclass(value)
    }
    if isinstance(known, Source) and given.get("family", known.family) != known.family:
        # The model and the data of one task are no use for another.
        return Source(**changes)
    return replace(known, **changes)


def _ranks(cohort: str | None, ranks: str | None) -> dict[str, tuple[int, ...]]:
    if cohort is not None and ranks is not None:
        raise UsageError("--ranks", "given together with --cohort", "give one of them")
    if cohort is not None:
        return {"ranks": ranks_in(cohort)}
    return {} if ranks is None else {"ranks": whole_numbers("--ranks", ranks)}


def _next(report: SimulateReport) -> str:
    """The command for the finished arm with the largest ρ, if any arm has finished."""
    ended = [row for row in report.best if row.rounds and not row.diverged]
    if not ended:
        return ""
    row = max(ended, key=lambda row: row.energy_ratio.mean or 0)
    return f"fedlora diagnose {quoted(row.folders[0])}"
