"""A run: all rounds of an arm at a learning rate with a seed, stored in files."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.analysis.diagnosis.diagnose import diagnose
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.clients.sample_counts import MOST_SAMPLES
from fedlora_cli.errors import NotFinite
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.output import write_file
from fedlora_cli.formats.terms import WEIGHTS
from fedlora_cli.linalg.spectrum import energy_ratio
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.reports.document import to_json
from fedlora_cli.rounds.aggregate import aggregate
from fedlora_cli.rounds.distribute import distribute
from fedlora_cli.rounds.options import DistributeOptions
from fedlora_cli.simulation.options import Setting, SimulateOptions
from fedlora_cli.simulation.places import DIAGNOSIS, METRICS, Run, round_folder, start_folder
from fedlora_cli.simulation.scoring import score
from fedlora_cli.simulation.split import drawn, training_seed
from fedlora_cli.simulation.task import IntArray, Task
from fedlora_cli.simulation.training import Diverged, making, starting_from, train_client


@dataclass(frozen=True, eq=False)
class Federation:
    """Data shared by the runs of a seed. `base` is the base model, on its device; `names` are those
    of the clients, `parts` the positions of their examples.
    """

    root: Path
    options: SimulateOptions
    task: Task
    base: Any
    names: tuple[str, ...]
    parts: tuple[IntArray, ...]

    @property
    def setting(self) -> Setting:
        return self.options.setting


def course(root: Path, run: Run, rounds: int, after: int = 0) -> Iterator[dict[str, Any]]:
    """The metrics of the finished rounds of a run from `after` + 1 on, up to a diverged round."""
    for number in range(after + 1, rounds + 1):
        path = round_folder(run.folder(root), number) / METRICS
        if not path.exists():
            return
        metrics = read_object(path)
        yield metrics
        if metrics["diverged"]:
            return


def is_done(root: Path, run: Run, rounds: int) -> bool:
    """Whether a run has all its rounds, or diverged, and is diagnosed."""
    known = list(course(root, run, rounds))
    last = known[-1] if known else {"diverged": None}
    if not last["diverged"] and (len(known) < rounds or "accuracy" not in last):
        return False
    path = run.folder(root) / DIAGNOSIS
    whole = sum(not metrics["diverged"] for metrics in known)
    return whole == (len(read_object(path)["adapters"]) if path.exists() else 0)


def perform(federation: Federation, run: Run, on_round: Callable[[], None]) -> None:
    """Do the remaining rounds of a run, and call `on_round` after each.

    A run that was interrupted and resumed writes the same files. Raises FedloraError.
    """
    folder = run.folder(federation.root)
    rounds = federation.options.rounds
    known = list(course(federation.root, run, rounds))
    while len(known) < rounds and not (known and known[-1]["diverged"]):
        known.append(_round(federation, run, len(known) + 1))
        on_round()
    if not known[-1]["diverged"] and "accuracy" not in known[-1]:
        # It was not scored, because it was not the last round then.
        last = round_folder(folder, rounds)
        known[-1] |= _scores(federation, last / "global")
        _write_metrics(last, known[-1])
    whole = [metrics for metrics in known if not metrics["diverged"]]
    if whole:
        ranks = federation.setting.ranks
        # If all ranks are equal, there are no rank indices beyond the shared rank.
        shared = min(ranks) if min(ranks) < max(ranks) else None
        options = DiagnoseOptions("rounds", shared, jobs=1)
        report = diagnose([round_folder(folder, m["round"]) / "global" for m in whole], options)
        write_file(folder / DIAGNOSIS, to_json(report.to_dict()).encode())


def _round(federation: Federation, run: Run, number: int) -> dict[str, Any]:
    """A round: distribute, train, aggregate, score. The metrics are written last."""
    folder = round_folder(run.folder(federation.root), number)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interruption
    with making(folder):
        folder.mkdir(parents=True)
    clients, result = folder / "clients", folder / "global"
    present = drawn(federation.setting, run.seed, number)
    began = time.perf_counter()
    start = _start(federation, run, number, present)
    handed_out = time.perf_counter()
    metrics: dict[str, Any] = {"round": number, "diverged": None}
    metrics["clients"] = [federation.names[k] for k in present]
    try:
        losses = _train(federation, run, number, present, start, clients)
        trained = time.perf_counter()
        report = _aggregate(federation, run, clients, result)
    except Diverged as error:
        metrics["diverged"] = str(error)
    else:
        aggregated = time.perf_counter()
        scored = number % federation.options.score_every == 0
        if scored or number == federation.options.rounds:
            metrics |= _scores(federation, result)
        ranks = federation.setting.ranks
        spectra = [np.array(module.singular_values) for module in report.modules]
        metrics |= {
            "loss": float(np.mean(losses)),
            "energy_ratio": _number(energy_ratio(spectra, min(ranks))),
            "norm": report.norm,
            "bytes_up": sum(map(_size, clients.iterdir())),
            "bytes_down": sum(_size(start / f"rank-{ranks[k]}") for k in present),
            "client_seconds": trained - handed_out,
            "server_seconds": (handed_out - began) + (aggregated - trained),
        }
    if number > 1:
        shutil.rmtree(start)
        if not federation.options.keep_clients:
            before = round_folder(run.folder(federation.root), number - 1)
            shutil.rmtree(before / "clients", ignore_errors=True)
    _write_metrics(folder, metrics)
    return metrics


def _scores(federation: Federation, adapter: Path) -> dict[str, float]:
    validation, test = score(federation.task, federation.base, adapter)
    return {"validation": validation, "accuracy": test}


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    write_file(folder / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


def _start(federation: Federation, run: Run, number: int, present: tuple[int, ...]) -> Path:
    """The folder with the adapters, one for each rank, from which clients start this round."""
    if number == 1:
        return start_folder(federation.root, run.seed)
    last = round_folder(run.folder(federation.root), number - 1) / "global"
    folder = round_folder(run.folder(federation.root), number) / "start"
    ranks = tuple(sorted({federation.setting.ranks[k] for k in present}))
    distribute(last, folder, options=DistributeOptions(ranks=ranks, jobs=1))
    return folder


def _train(
    federation: Federation,
    run: Run,
    number: int,
    present: tuple[int, ...],
    start: Path,
    clients: Path,
) -> list[float]:
    """Train all clients of the round. Returns their losses. Raises Diverged."""
    setting = federation.setting
    losses = []
    for rank in sorted({setting.ranks[k] for k in present}):
        with starting_from(federation.base, start / f"rank-{rank}") as begun:
            losses += [
                train_client(
                    begun,
                    federation.task.train,
                    federation.parts[k],
                    setting.training,
                    run.rate,
                    training_seed(run.seed, number, k),
                    clients / federation.names[k],
                )
                for k in present
                if setting.ranks[k] == rank
            ]
    return losses


def _aggregate(federation: Federation, run: Run, clients: Path, result: Path) -> AggregateReport:
    """Aggregate at the largest rank of all clients. Raises Diverged if their updates overflow."""
    options = AggregateOptions(
        method=run.arm.method,
        quorum=run.arm.quorum,
        momentum=run.arm.momentum,
        rank=max(federation.setting.ranks),
        rounds=run.folder(federation.root),
        # All clients are simulated, so any sample count and equal weights are legitimate.
        max_count_ratio=MOST_SAMPLES,
        allow_copies=True,
        jobs=1,
    )
    try:
        return aggregate(clients, result, options)
    except NotFinite as error:
        raise Diverged(str(error)) from None


def _size(adapter: Path) -> int:
    return (adapter / WEIGHTS).stat().st_size


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
