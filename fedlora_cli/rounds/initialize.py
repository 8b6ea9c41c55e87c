"""Round 0: a shared initial adapter, truncated to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.adapters.expert_layouts import SINCE_0_19_1
from fedlora_cli.clients.cohort import Cohort
from fedlora_cli.clients.reading import Paths, paths_of, read_without_counts
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.execution import engine
from fedlora_cli.files.folder import check_apart
from fedlora_cli.files.locations import location
from fedlora_cli.formats.skeleton import Skeleton, make_skeleton, parameter_name
from fedlora_cli.formats.terms import TASK_TYPES, target_of
from fedlora_cli.libraries import muted
from fedlora_cli.remote import Location
from fedlora_cli.reports.distribution import HeadRow, InitReport, TargetRow
from fedlora_cli.rounds.acceptance import check_in_peft
from fedlora_cli.rounds.distribution import (
    check_room,
    claimed_folder,
    distribution_row,
    hand_out,
)
from fedlora_cli.rounds.heads import head_tensors
from fedlora_cli.rounds.initial_adapters import (
    full_tensor,
    initial_factors,
    recipient_like,
    recipient_of_rank,
)
from fedlora_cli.rounds.options import CLASSES, InitOptions
from fedlora_cli.text import shortened
from fedlora_cli.version import __version__

DEFAULTS = InitOptions()

_OTHER_BASE = "give the base model of these clients, and their --task and --num-labels"


def initialize(
    base: Path | str,
    output: Location | str,
    clients: Paths = (),
    options: InitOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> InitReport:
    """Write initial adapters for a base model: into `output/rank-<r>/` for every rank, or into
    `output/<client>/` like adapters that clients have.

    All adapters share their directions: A has the first r of the same random rows, uniform in
    ±1/sqrt(in) as in PEFT, and B is zero (in an embedding, A is zero and B normal, as in PEFT). So
    rank index i means the same for all clients, on which raFLoRA's weights rely. Of the base model,
    only the configuration and the heads that are trained in full are read. Raises UsageError,
    InputError and OutputError; no file is written then.
    """
    output, places = location(output), paths_of(clients)
    _check_choices(places, options)
    cohort, remarks = _cohort(places, str(base), options.adapter) if places else (None, ())
    read = [] if cohort is None else [client.adapter.path for client in cohort.clients]
    check_apart(output, [*places, *read, *([Path(base)] if Path(base).is_dir() else [])])
    with claimed_folder(output, force=options.force):
        read_base = stage("reading the base model")
        with muted():
            skeleton = _skeleton(str(base), cohort, options)
            heads, drawn = head_tensors(skeleton, str(base), options.revision, options.seed)
        read_base(1, 1)
        tensors = {
            name: full_tensor(heads[name], owner) for name, (_, owner) in skeleton.heads.items()
        }
        recipients = (
            [
                recipient_of_rank(rank, str(base), skeleton, tensors, options)
                for rank in sorted({*options.ranks})
            ]
            if cohort is None
            else [
                recipient_like(client, str(base), skeleton, tensors, options)
                for client in cohort.clients
            ]
        )
        check_room(recipients, output)
        sizes = hand_out(
            recipients,
            partial(initial_factors, skeleton, options.seed),
            output,
            {"version": __version__, "initial": str(base), "seed": options.seed},
            force=options.force,
            jobs=options.jobs or engine.available_cores(),
            progress=stage("writing adapters"),
            check=partial(check_in_peft, skeleton.model, str(base), recipients),
        )
    rows = zip(recipients, sizes, strict=True)
    return InitReport(
        base_model=str(base),
        model_class=skeleton.model_class.rpartition(".")[2],
        task_type=recipients[0].metadata.task_type,
        seed=options.seed,
        output=str(output),
        targets=_targets(skeleton),
        tensors=tuple(
            HeadRow(name, one.shape, one.dtype, one.owner in drawn)
            for name, one in sorted(tensors.items())
        ),
        adapters=tuple(distribution_row(one, output, size, {}) for one, size in rows),
        warnings=(
            *remarks,
            *_passed_over(skeleton),
            *(f"the base model has no {head} of this shape: drawn at random" for head in drawn),
        ),
        version=__version__,
    )


def _check_choices(places: Sequence[Location], options: InitOptions) -> None:
    if bool(places) == bool(options.ranks):
        found = "given with --ranks" if places else "neither --like nor --ranks is given"
        raise UsageError("--like", found, "give one of them")
    if options.adapter is not None and not places:
        raise UsageError("--adapter", "given without --like", "give both or neither")
    for flag, given in (
        ("--target-modules", options.target_modules),
        ("--target-parameters", options.target_parameters),
        ("--modules-to-save", options.modules_to_save),
    ):
        if places and given:
            raise UsageError(
                flag, "given with --like", "the clients' adapters decide it; leave it out"
            )


def _cohort(
    places: Sequence[Location], base: str, adapter: str | None
) -> tuple[Cohort, tuple[str, ...]]:
    """The clients, with `base` as their base model, and remarks. Raises InputError."""
    cohort, remarks = read_without_counts(places, base, adapter)
    for client in cohort.clients:
        _check_plain(client.adapter)
    return cohort, remarks


def _check_plain(adapter: Adapter) -> None:
    """Raise InputError unless the adapter has only factors and heads.

    The initial values of other tensors come from the base model's weights.
    """
    roles = {tensor.role for tensor in adapter.tensors.values()} - {"saved", "base"}
    special = sorted(role.replace("_", " ") for role in roles)
    if special or adapter.format != "peft":
        found = f"it has more than factors and heads: {', '.join(special) or adapter.format}"
        cure = "save the initial adapter of one client, and run distribute --like with it"
        raise InputError(adapter.path, found, cure)
    kinds = {module.layout.kind for module in adapter.modules.values()}
    layout = adapter.metadata.expert_layout
    if layout != SINCE_0_19_1 and "experts" in kinds:
        found = f"PEFT {layout.versions} stored its experts, in another layout than today's PEFT"
        raise InputError(adapter.path, found, "start its next round with a later version of PEFT")


def _skeleton(base: str, cohort: Cohort | None, options: InitOptions) -> Skeleton:
    """The base model with the modules of the options, or of all clients together."""
    targets: Sequence[str] | str | None = options.target_modules
    task, saved, parameters = options.task, options.modules_to_save, options.target_parameters
    if cohort is not None:
        task, parameters = task or cohort.metadata.task_type, cohort.metadata.target_parameters
        adapters = [client.adapter for client in cohort.clients]
        layouts = [one.layout for adapter in adapters for one in adapter.modules.values()]
        targets = sorted({target_of(one.pair) for one in layouts if one.kind != "experts"})
        full = [tensor for adapter in adapters for tensor in adapter.tensors.values()]
        saved = tuple(sorted({tensor.owner for tensor in full if tensor.owner is not None}))
    try:
        skeleton = make_skeleton(
            base,
            options.revision,
            None if task is None else CLASSES[task],
            task if task in TASK_TYPES else None,
            targets,
            saved,
            options.num_labels,
            parameters,
        )
    except UsageError as error:
        if cohort is None:
            raise
        # The clients' adapters name these modules, not an option.
        raise InputError(base, error.found, _OTHER_BASE) from None
    for client in cohort.clients if cohort is not None else ():
        _check_client(client.adapter, skeleton, base)
    if options.num_labels is not None and not skeleton.heads:
        cure = "give --task or --modules-to-save as well"
        raise UsageError("--num-labels", "no head is trained in full", cure)
    if options.dropout and any(one.layout.kind == "experts" for one in skeleton.modules.values()):
        found = "given for a mixture of experts, where PEFT takes no dropout"
        raise UsageError("--dropout", found, "leave it out")
    largest = max(min(one.shape) for one in skeleton.modules.values())
    for rank in options.ranks:
        if rank > largest:
            found = f"{rank}, where no module has more than {largest} directions"
            raise UsageError("--ranks", found, "give a smaller one")
    return skeleton


def _check_client(adapter: Adapter, skeleton: Skeleton, base: str) -> None:
    """Raise InputError unless the base model has the client's modules and heads."""
    client: dict[str, tuple[int, ...]] = {name: m.shape for name, m in adapter.modules.items()}
    client |= {name: one.shape for name, one in adapter.tensors.items() if one.owner is not None}
    model: dict[str, tuple[int, ...]] = {name: m.shape for name, m in skeleton.modules.items()}
    model |= {name: tuple(meta.shape) for name, (meta, _) in skeleton.heads.items()}
    for name, shape in client.items():
        if model.get(name) != shape:
            has = " x ".join(map(str, model[name])) if name in model else "no such module"
            found = f"{name} is {' x '.join(map(str, shape))} there, and {has} in {base}"
            raise InputError(adapter.path, found, _OTHER_BASE)


def _passed_over(skeleton: Skeleton) -> tuple[str, ...]:
    """A remark about named layers that PEFT does not adapt."""
    if not skeleton.passed_over:
        return ()
    names = shortened(skeleton.passed_over)
    return (f"PEFT applies the names of experts to parameters only and does not adapt {names}",)


def _targets(skeleton: Skeleton) -> tuple[TargetRow, ...]:
    """The adapted modules by last name and shape in the model's order; experts by parameter."""
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name, one in skeleton.modules.items():
        last = name.rpartition(".")[2]
        if one.layout.kind == "experts":
            last = ".".join(parameter_name(one.layout).split(".")[-2:])
        groups.setdefault((last, one.shape), []).append(name)
    return tuple(TargetRow(last, shape, tuple(all_)) for (last, shape), all_ in groups.items())
