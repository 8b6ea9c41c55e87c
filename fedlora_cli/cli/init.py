"""`fedlora init`: round 0."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fedlora_cli.aggregation.options import Dtype
from fedlora_cli.cli.distribution import (
    OUTPUT,
    Alpha,
    HandoutForce,
    HandoutJobs,
    Like,
    LikeAdapter,
    folders_like,
    names_of,
    print_result,
    ranks_of,
)
from fedlora_cli.cli.shared import Debug, Json, Null, Quiet, errors, guarded, heavy_imports, option
from fedlora_cli.render.progress import progress_on
from fedlora_cli.render.views.distribution import init_view
from fedlora_cli.reports.document import init_document
from fedlora_cli.rounds.options import ALL_LINEAR, CLASSES, InitOptions

_TRAINED = "What is trained"
_START = "How it starts"


@guarded
def initialize(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base model: a folder, or a name on the hub.")
    ],
    output: Annotated[
        str, option("--output", "-o", metavar="DIR", help="Write a folder for each adapter here.")
    ],
    ranks: Annotated[
        list[str] | None,
        option("--ranks", "--rank", "-r", metavar="R,R,...", help="One adapter at each rank."),
    ] = None,
    like: Like = None,
    adapter: LikeAdapter = None,
    alpha: Alpha = None,
    scaling: Annotated[
        float | None, option("--scaling", help="Instead: alpha / r of all; default: 2.")
    ] = None,
    target_modules: Annotated[
        str | None,
        option(
            "--target-modules",
            panel=_TRAINED,
            metavar="NAME,NAME,...",
            help="Modules to adapt, or all-linear; default: PEFT's for the architecture.",
        ),
    ] = None,
    target_parameters: Annotated[
        str | None,
        option(
            "--target-parameters",
            panel=_TRAINED,
            metavar="NAME,NAME,...",
            help="Parameters to adapt, such as experts.down_proj of a mixture of experts.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        option(
            "--task",
            panel=_TRAINED,
            help=f"One of: {', '.join(CLASSES)}; default: as the base model was saved.",
        ),
    ] = None,
    modules_to_save: Annotated[
        str | None,
        option(
            "--modules-to-save",
            panel=_TRAINED,
            metavar="NAME,NAME,...",
            help="Heads to train in full, such as classifier.",
        ),
    ] = None,
    num_labels: Annotated[
        int | None, option("--num-labels", panel=_TRAINED, help="How many classes a head has.")
    ] = None,
    seed: Annotated[
        int, option("--seed", panel=_START, show_default=True, help="Of A, and of new heads.")
    ] = 0,
    dropout: Annotated[
        float | None,
        option("--dropout", panel=_START, help="lora_dropout; default: the clients' own, or 0."),
    ] = None,
    revision: Annotated[
        str | None, option("--revision", panel=_START, help="Of a base model on the hub.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        option("--dtype", panel=OUTPUT, help="Default: the clients' own, or float32."),
    ] = None,
    jobs: HandoutJobs = 0,
    force: HandoutForce = False,
    null: Null = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every adapter and every module.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Start a federation: one initial adapter for all, cut to every rank.

    Of the base model only its configuration is read, and heads that are trained in full.

    Examples:

    fedlora init meta-llama/Llama-3.1-8B -o round-00 --ranks 4,8,16

    fedlora init base -o round-00 --ranks 2,8 --target-modules q_proj,v_proj --alpha 16

    fedlora init base -o round-00 --like clients
    """
    targets = None if target_modules is None else names_of("--target-modules", target_modules)
    options = InitOptions(
        ranks=ranks_of("--ranks", ranks or []),
        alpha=alpha,
        scaling=scaling,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
        target_parameters=names_of("--target-parameters", target_parameters),
        task=task,
        modules_to_save=names_of("--modules-to-save", modules_to_save),
        num_labels=num_labels,
        seed=seed,
        dropout=dropout,
        dtype=dtype,
        revision=revision,
        jobs=jobs,
        force=force,
        adapter=adapter,
    )
    clients = folders_like(like, null=null)
    with heavy_imports():
        from fedlora_cli.rounds.initialize import initialize as run

    with progress_on(errors(), shown=not quiet) as stage:
        report = run(base, output, clients, options, stage)
    print_result(
        report,
        init_document,
        partial(init_view, details=verbose),
        json=json,
        quiet=quiet,
        following="fedlora aggregate CLIENTS -o global",
    )
