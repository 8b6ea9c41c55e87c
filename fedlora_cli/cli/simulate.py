"""`fedlora simulate`: whole federations with real training, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora_cli.cli import choices
from fedlora_cli.cli.arms import arms_of, seeds_of
from fedlora_cli.cli.distribution import names_of
from fedlora_cli.cli.federation import ranks_in
from fedlora_cli.cli.pictures import Html, Plot, check_pictures, write_pictures
from fedlora_cli.cli.shared import (
    Debug,
    Json,
    Quiet,
    errors,
    guarded,
    heavy_imports,
    numbers,
    option,
    quoted,
    say,
    show,
    warn,
    whole_numbers,
)
from fedlora_cli.errors import UsageError
from fedlora_cli.files.interrupts import INTERRUPTED
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.simulate import simulate_view
from fedlora_cli.reports.document import simulate_document, to_json
from fedlora_cli.reports.simulate import SimulateReport
from fedlora_cli.rounds.options import ALL_LINEAR
from fedlora_cli.simulation.options import SimulateOptions, Source
from fedlora_cli.simulation.presets import NOTES, PRESETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PRESETS = ". ".join(f"{name}: {note}" for name, note in NOTES.items())


@guarded
def simulate(
    output: Annotated[
        Path,
        option("--output", "-o", metavar="RUN", help="Every file goes here; again to go on there."),
    ],
    preset: Annotated[
        str, option("--preset", show_default=True, help=f"What to begin with. {_PRESETS}.")
    ] = next(iter(PRESETS)),
    method: choices.Method = None,
    quorum: choices.Quorum = None,
    momentum: choices.Momentum = None,
    lr: choices.Lr = None,
    seeds: choices.Seeds = None,
    rounds: choices.Rounds = None,
    cohort: choices.Cohort = None,
    ranks: choices.Ranks = None,
    participation: choices.Participation = None,
    dirichlet: choices.Dirichlet = None,
    classes: choices.Classes = None,
    holdings: choices.Holdings = None,
    epochs: choices.Epochs = None,
    batch_size: choices.BatchSize = None,
    scaling: choices.Scaling = None,
    dropout: choices.Dropout = None,
    device: choices.Device = None,
    jobs: choices.Jobs = None,
    threads: choices.Threads = None,
    score_every: choices.ScoreEvery = None,
    keep_clients: choices.KeepClients = None,
    task: choices.Task = None,
    model: choices.Model = None,
    data: choices.Data = None,
    config: choices.Config = None,
    train_split: choices.TrainSplit = None,
    test_split: choices.TestSplit = None,
    input_: choices.Input = None,
    label: choices.Label = None,
    target_modules: choices.TargetModules = None,
    modules_to_save: choices.ModulesToSave = None,
    max_length: choices.MaxLength = None,
    max_new_tokens: choices.MaxNewTokens = None,
    limit: choices.Limit = None,
    dtype: choices.Dtype = None,
    plot: Plot = None,
    html: Html = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every round and the whole setting.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train whole federations and compare how they aggregate: methods × rates × seeds.

    Every round leaves the folders that other commands read; called again it goes on from there.

    Examples:

    fedlora simulate -o run

    fedlora simulate -o run -m flexlora,raflora --momentum 0,0.8 --lr 5e-4,1e-3 --plot run.png

    fedlora simulate -o run --cohort 8x4,4x16 -p 0.5 --quorum 0,0.5,1 --seeds 5
    """
    if classes is not None and dirichlet is not None:
        raise UsageError("--classes", "given together with --dirichlet", "give one of them")
    options = _options(
        _preset(preset),
        source=_given(
            family=task,
            model=model,
            data=None if data is None else tuple(data),
            config=config,
            train_split=train_split,
            test_split=test_split,
            input=input_,
            label=label,
            target_modules=_targets(target_modules),
            modules_to_save=_names("--modules-to-save", modules_to_save),
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            limit=limit,
            dtype=dtype,
        ),
        split=_given(dirichlet=dirichlet, classes=classes, holdings=holdings),
        training=_given(epochs=epochs, batch_size=batch_size, scaling=scaling, dropout=dropout),
        setting=_given(ranks=_ranks(cohort, ranks), participation=participation),
        rest=_given(
            rates=None if lr is None else numbers("--lr", lr),
            seeds=None if seeds is None else seeds_of(seeds),
            rounds=rounds,
            score_every=score_every,
            keep_clients=keep_clients,
            device=device,
            jobs=jobs,
            threads=threads,
        ),
    )
    options = replace(options, arms=arms_of(method or [], quorum, momentum, options.arms))
    check_pictures(plot, html)
    with heavy_imports():
        from fedlora_cli.simulation.simulate import simulate as run

    console = errors()
    try:
        with progress_on(console, shown=not quiet) as stage:
            report = run(output, options, stage)
    except KeyboardInterrupt:
        found = f"interrupted; the same command goes on from the last whole rounds in {output}"
        say(console, "error", found, "bold red")
        raise typer.Exit(INTERRUPTED) from None
    if not quiet:
        warn(report.warnings)
    written = write_pictures(
        plot,
        html,
        lambda: _draw(report),
        lambda: simulate_view(report, details=True, warnings=True),
    )
    if json:
        typer.echo(to_json(simulate_document(report)), nl=False)
    elif not quiet:
        show(simulate_view(report, details=verbose))
    if not quiet:
        for path in (output, *written):
            say(console, "wrote", quoted(path), "bold green")
        if next_ := _next(report):
            say(console, "next", next_, "bold")


def _preset(name: str) -> SimulateOptions:
    """The choices to begin with. Raises UsageError."""
    if name not in PRESETS:
        found = f"no preset is called {name}"
        raise UsageError("--preset", found, f"use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _given(**values: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _options(
    known: SimulateOptions,
    *,
    source: dict[str, Any],
    split: dict[str, Any],
    training: dict[str, Any],
    setting: dict[str, Any],
    rest: dict[str, Any],
) -> SimulateOptions:
    """The known options with what was given instead. Raises UsageError."""
    old = known.setting
    task = source.get("family", old.source.family)
    # Nothing of a model and of data is good for another task.
    kept = vars(old.source) if task == old.source.family else {}
    new = replace(
        old,
        source=Source(**{**kept, **source}),
        split=replace(old.split, **split),
        training=replace(old.training, **training),
        **setting,
    )
    return replace(known, setting=new, **rest)


def _ranks(cohort: str | None, ranks: str | None) -> tuple[int, ...] | None:
    if cohort is not None and ranks is not None:
        raise UsageError("--ranks", "given together with --cohort", "give one of them")
    if cohort is not None:
        return ranks_in(cohort)
    return None if ranks is None else whole_numbers("--ranks", ranks)


def _names(flag: str, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else names_of(flag, text)


def _targets(text: str | None) -> tuple[str, ...] | str | None:
    names = _names("--target-modules", text)
    return ALL_LINEAR if names == (ALL_LINEAR,) else names


def _next(report: SimulateReport) -> str:
    """To look at the arm that has collapsed most, if any came to its end."""
    ended = [row for row in report.best if row.rounds and not row.diverged]
    if not ended:
        return ""
    row = max(ended, key=lambda row: row.energy_ratio.mean or 0)
    return f"fedlora diagnose {quoted(row.folders[0])}"


def _draw(report: SimulateReport) -> Figure:
    from fedlora_cli.render.figures.simulate import simulate_figure

    return simulate_figure(report)
