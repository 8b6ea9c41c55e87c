"""Compare whole federations with real training: arms × learning rates × seeds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedlora_cli.analysis.lead import lead
from fedlora_cli.errors import OutputError, UsageError
from fedlora_cli.execution import engine
from fedlora_cli.files.alone import alone_in
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.output import write_file
from fedlora_cli.libraries import muted
from fedlora_cli.methods import distributions, find
from fedlora_cli.reports.document import to_json
from fedlora_cli.reports.simulate import ArmRow, SimulatedClient, SimulateReport
from fedlora_cli.rounds.initialize import initialize
from fedlora_cli.rounds.options import InitOptions
from fedlora_cli.simulation.client_list import read_client_list
from fedlora_cli.simulation.course import course, is_done
from fedlora_cli.simulation.loading import loaded
from fedlora_cli.simulation.options import SimulateOptions
from fedlora_cli.simulation.places import (
    CLIENTS,
    LOCK,
    REPORT,
    SETTING,
    Run,
    seed_folder,
    start_folder,
)
from fedlora_cli.simulation.scoring import score
from fedlora_cli.simulation.split import parts_of
from fedlora_cli.simulation.summary import arm_rows, spread
from fedlora_cli.simulation.task import IntArray, Task
from fedlora_cli.simulation.workers import perform_all, threads
from fedlora_cli.text import shortened
from fedlora_cli.version import __version__

_START = "start.json"

DEFAULTS = SimulateOptions()


def simulate(
    output: Path | str,
    options: SimulateOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> SimulateReport:
    """Train federations and compare their arms. All files stay in the folder `output`.

    Each round is `distribute`, training with PEFT, and `aggregate` with `--rounds`, by the same
    functions as the commands, in `output/seed-<s>/<arm>-lr<rate>/round-<t>/`. Another call for the
    same folder resumes it, and may add rounds, arms, rates or seeds, but not change the setting.
    Equal options give equal results. Raises UsageError, InputError and OutputError.
    """
    root = Path(output)
    _make_folder(root)
    with alone_in(root):
        return _simulate(root, options, stage)


def _simulate(root: Path, options: SimulateOptions, stage: engine.Stage) -> SimulateReport:
    began = time.perf_counter()
    options = _with_listed_ranks(options)
    setting = _settle(root, options)
    with muted(), threads(options.threads):
        task, _ = loaded(options.setting.source, root, options.device)
        for seed in options.seeds:
            names, parts = parts_of(task.train, options.setting, seed)
        clients = _settle_clients(root, names, parts, task, options)
        starts = [_start(root, seed, task, options) for seed in options.seeds]
    grid = product(options.seeds, options.arms, options.rates)
    runs = [Run(arm, rate, seed) for seed, arm, rate in grid]
    look = _looking(root, runs, options.rounds, stage("rounds"))
    look()
    waiting = [run for run in runs if not is_done(root, run, options.rounds)]
    if waiting:
        perform_all(root, options, waiting, _jobs(options, waiting), look)
    rows = arm_rows(root, options)
    report = SimulateReport(
        output=str(root),
        task=task.name,
        model=task.model,
        setting=setting,
        ranks=options.setting.ranks,
        shared_rank=min(options.setting.ranks),
        present=options.setting.present,
        rounds=options.rounds,
        seeds=options.seeds,
        train_examples=len(task.train),
        test_examples=len(task.test),
        start_accuracy=spread(starts),
        arms=rows,
        clients=clients,
        lead=lead([row for row in rows if row.best], len(task.test)),
        seconds=time.perf_counter() - began,
        warnings=(
            *task.remarks,
            *_warnings(options, rows, len(runs) - len(waiting), len(runs)),
        ),
        version=__version__,
        distributions=distributions(find(arm.method) for arm in options.arms),
    )
    write_file(root / REPORT, to_json(report.to_dict()).encode())
    return report


def _make_folder(root: Path) -> None:
    """Create the folder and its lock. It may hold a simulation or nothing. Raises OutputError."""
    if root.exists() and not (root / SETTING).exists() and not _is_empty(root):
        raise OutputError(root, "it exists and is not a simulation", "choose another folder")
    try:
        root.mkdir(exist_ok=True)
        (root / LOCK).touch()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(root, f"cannot be created ({reason})", "check the path") from None


def _is_empty(root: Path) -> bool:
    """Whether the folder is empty except for the lock, as after an early interruption."""
    return root.is_dir() and all(path.name == LOCK for path in root.iterdir())


def _settle(root: Path, options: SimulateOptions) -> dict[str, Any]:
    """The setting of the folder, from its file or written to it. Raises OutputError."""
    setting: dict[str, Any] = json.loads(json.dumps(asdict(options.setting)))
    if options.setting.source.fixed is not None:
        del setting["split"]
    else:  # as in folders of versions without these options
        del setting["source"]["client_column"], setting["source"]["clients_from"]
    path = root / SETTING
    known = read_object(path).get("setting") if path.exists() else None
    if known == setting:
        return setting
    if _has_rounds(root):
        found = f"a simulation with another setting ({_difference(known, setting)})"
        raise OutputError(root, found, "give the options of the first call, or another folder")
    # Nothing was trained with the old setting, so it may be corrected.
    for folder in root.glob("seed-*"):
        shutil.rmtree(folder)
    text = json.dumps({"version": __version__, "setting": setting}, indent=2) + "\n"
    write_file(path, text.encode())
    return setting


def _has_rounds(root: Path) -> bool:
    return any(root.glob("seed-*/*/round-*"))


def _settle_clients(
    root: Path,
    names: Sequence[str],
    parts: Sequence[IntArray],
    task: Task,
    options: SimulateOptions,
) -> tuple[SimulatedClient, ...] | None:
    """The clients that the data fix, kept in a file of the folder; None if a seed deals the rows.

    Raises OutputError if the folder has rounds of clients with other rows.
    """
    owners = task.train.owners
    if owners is None:
        return None
    clients = list(zip(names, options.setting.ranks, parts, strict=True))
    lists = {
        name: {"rank": rank, "rows": owners.rows[part].tolist()} for name, rank, part in clients
    }
    path, content = root / CLIENTS, to_json(lists).encode()
    if not path.exists() or path.read_bytes() != content:
        if _has_rounds(root):
            found = "a simulation whose clients have other rows"
            raise OutputError(root, found, "give the data of the first call, or another folder")
        write_file(path, content)
    return tuple(SimulatedClient(name, rank, len(part)) for name, rank, part in clients)


def _with_listed_ranks(options: SimulateOptions) -> SimulateOptions:
    """The options with the ranks in the file of clients, if it has any. Raises UsageError."""
    setting, file = options.setting, options.setting.source.clients_from
    ranks = () if file is None else tuple(read_client_list(file).ranks.values())
    if not ranks:
        return options
    if setting.ranks:
        raise UsageError("--ranks", f"given, but {file} has ranks", "leave out one of them")
    return replace(options, setting=replace(setting, ranks=ranks))


def _difference(known: object, wanted: object, where: str = "setting") -> str:
    """The first difference between two settings, as text."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for name in wanted:
            if known.get(name) != wanted[name]:
                return _difference(known.get(name), wanted[name], name)
    old, new = ("not given" if value is None else str(value)[:60] for value in (known, wanted))
    return f"{where}: {old} there, {new} now"


def _start(root: Path, seed: int, task: Task, options: SimulateOptions) -> float:
    """The accuracy of the initial adapter of a seed, which is created if it is missing."""
    setting, folder = options.setting, start_folder(root, seed)
    if not folder.exists():
        seed_folder(root, seed).mkdir(exist_ok=True)
        chosen = InitOptions(
            ranks=tuple(sorted(set(setting.ranks))),
            scaling=setting.training.scaling,
            target_modules=task.target_modules,
            task=task.task,
            modules_to_save=task.modules_to_save,
            num_labels=task.num_labels,
            dropout=setting.training.dropout,
            seed=seed,
            jobs=1,
        )
        initialize(task.model, folder, options=chosen)
    path = seed_folder(root, seed) / _START
    if not path.exists():
        _, base = loaded(setting.source, root, options.device)
        _, accuracy = score(task, base, folder / f"rank-{min(setting.ranks)}")
        write_file(path, (json.dumps({"accuracy": accuracy}) + "\n").encode())
    return float(read_object(path)["accuracy"])


def _looking(
    root: Path, runs: Sequence[Run], rounds: int, progress: engine.Progress
) -> Callable[[], None]:
    """A function that reports how many rounds are finished, from the new files in the folder."""
    counts = dict.fromkeys(runs, 0)

    def look() -> None:
        for run, known in counts.items():
            new = list(course(root, run, rounds, known))
            # A diverged run has no further rounds.
            over = any(metrics["diverged"] for metrics in new)
            counts[run] = rounds if over else known + len(new)
        progress(sum(counts.values()), len(runs) * rounds)

    return look


def _jobs(options: SimulateOptions, waiting: Sequence[Run]) -> int:
    on_cpu = options.device == "cpu"
    wanted = options.jobs or (max(1, engine.available_cores() // options.threads) if on_cpu else 1)
    return min(wanted, len(waiting))


def _warnings(
    options: SimulateOptions, rows: Sequence[ArmRow], known: int, runs: int
) -> tuple[str, ...]:
    warnings = []
    if known:
        warnings.append(f"{known} of {runs} runs were already finished")
    if len(options.seeds) < 3:
        warnings.append("fewer than 3 seeds: differences between the arms may be chance")
    if len(options.rates) == 1 and len(options.arms) > 1:
        warnings.append(
            "one learning rate for all arms: one may lead because its steps are larger; "
            "--lr 5e-4,1e-3,2e-3,4e-3 compares each at its best"
        )
    ends = {min(options.rates), max(options.rates)}
    at_end = [row.arm for row in rows if row.best and row.rate in ends]
    if len(options.rates) > 1 and at_end:
        names = shortened(at_end, 4)
        warnings.append(f"best at an end of the learning rates: {names}; give more of them")
    return tuple(warnings)
