"""Whole federations: real training, through the files that every other command reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapters import relative_error, written_update

from fedlora_cli import AggregateOptions, InputError, aggregate, diagnose, read
from fedlora_cli.errors import OutputError, UsageError
from fedlora_cli.libraries import muted
from fedlora_cli.simulation.arm import Arm
from fedlora_cli.simulation.options import Setting, SimulateOptions, Source, Split, Training
from fedlora_cli.simulation.places import Run
from fedlora_cli.simulation.simulate import simulate
from fedlora_cli.simulation.task import Task
from fedlora_cli.simulation.tasks import digits
from fedlora_cli.simulation.training import Diverged, starting_from, train_client
from fedlora_cli.simulation.workers import threads

SETTING = Setting(
    Source(limit=60), ranks=(2, 2, 4, 8), participation=0.75, training=Training(batch_size=32)
)
ARMS = (Arm("flexlora"), Arm("raflora", momentum=0.5))
OPTIONS = SimulateOptions(SETTING, ARMS, rates=(2e-3,), seeds=(0,), rounds=3, jobs=1)
MODULE = "vit.layers.1.mlp.fc1"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of the embedded task, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("digits") / "base"
    with threads(1), muted():
        digits.make_task(folder)
    return folder


Place = Callable[[str], Path]


@pytest.fixture(scope="session")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder for a simulation, with the base model there already."""

    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp("simulations") / name
        simulate_nothing(root)
        shutil.copytree(base, root / "base")
        return root

    return make


def simulate_nothing(root: Path) -> None:
    """What the first call leaves before anything is trained."""
    from fedlora_cli.simulation.simulate import _make_folder, _settle

    _make_folder(root)
    _settle(root, OPTIONS)


@pytest.fixture(scope="module")
def done(place: Place) -> Path:
    root = place("run")
    simulate(root, OPTIONS)
    return root


@pytest.fixture
def task(base: Path) -> Task:
    return digits.make_task(base, 60)


def files(root: Path) -> dict[str, bytes]:
    """Every weights file of the global adapters."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("global/adapter_model.safetensors"))
    }


def test_the_parts_of_the_digits_are_apart_and_complete() -> None:
    _, labels = digits._images()
    parts = digits._parts(labels)
    server, clients, validation, test = parts

    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))
    assert set(labels[torch.from_numpy(server)].tolist()) == {0, 1, 2, 3, 4}
    for part in (clients, validation, test):
        assert set(labels[torch.from_numpy(part)].tolist()) == set(range(10))


def test_the_base_model_knows_the_servers_digits_and_no_others(base: Path) -> None:
    task = digits.make_task(base)
    with muted():
        model = task.load().eval()
    batch = task.test.batch(np.arange(len(task.test)))
    with torch.no_grad():
        right = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    known = batch["labels"] < 5

    assert right[known].float().mean() > 0.9
    assert right[~known].float().mean() < 0.1


def test_a_run_is_a_folder_of_rounds_for_every_other_command(done: Path) -> None:
    folder = Run(ARMS[1], 2e-3, 0).folder(done)
    last = folder / "round-03"
    metrics = json.loads((last / "metrics.json").read_text())
    report = diagnose(folder)

    assert folder == done / "seed-0" / "raflora-b0.5-lr0.002"
    assert report.subject == "rounds"
    assert len(report.adapters) == 3
    assert len(metrics["clients"]) == 3
    assert sorted(path.name for path in (last / "clients").iterdir()) == metrics["clients"]
    assert not (folder / "round-02" / "clients").exists()
    assert {read(path).rank for path in folder.glob("round-*/global")} == {8}


def test_a_round_is_what_aggregate_makes_of_its_clients(done: Path, tmp_path: Path) -> None:
    folder = Run(ARMS[1], 2e-3, 0).folder(done)
    aggregate(
        folder / "round-03" / "clients",
        tmp_path / "again",
        AggregateOptions(
            rank=8,
            momentum=0.5,
            previous=folder / "round-02/global",
            before_previous=folder / "round-01/global",
        ),
    )

    written = written_update(folder / "round-03" / "global", MODULE)
    assert relative_error(written_update(tmp_path / "again", MODULE), written) < 1e-6


def test_clients_start_from_the_truncation_of_the_last_round(
    done: Path, task: Task, tmp_path: Path
) -> None:
    """Training again from what `distribute` gives, with the same seed, gives the same client."""
    from fedlora_cli import DistributeOptions, distribute
    from fedlora_cli.simulation.split import deal, drawn, training_seed

    folder = Run(ARMS[0], 2e-3, 0).folder(done)
    distribute(folder / "round-02/global", tmp_path / "start", options=DistributeOptions((2, 4, 8)))
    k = drawn(SETTING, 0, 3)[0]
    mine = deal(task.train.labels, SETTING.ranks, SETTING.split, 0)[k]
    with muted(), starting_from(task.load(), tmp_path / f"start/rank-{SETTING.ranks[k]}") as start:
        train_client(
            start, task.train, mine, SETTING.training, 2e-3, training_seed(0, 3, k), tmp_path / "k"
        )

    theirs = folder / "round-03/clients" / f"client-{k + 1}"
    assert json.loads((theirs / "fedlora.json").read_text()) == {"samples": len(mine)}
    error = relative_error(written_update(tmp_path / "k", MODULE), written_update(theirs, MODULE))
    assert error < 1e-4  # threads of the test session may round otherwise


def test_the_report_says_what_the_files_say(done: Path) -> None:
    report = simulate(done, OPTIONS)  # nothing is left to do
    row = report.arms[1]
    folder = Run(ARMS[1], 2e-3, 0).folder(done)
    metrics = json.loads((folder / "round-03" / "metrics.json").read_text())
    own = diagnose(folder)

    assert (row.arm, row.momentum, row.rate, row.best) == ("raflora-b0.5", 0.5, 2e-3, True)
    assert row.accuracy.mean == metrics["accuracy"]
    assert row.accuracy.sd is None
    assert row.energy_ratio.mean == pytest.approx(own.adapters[-1].energy_ratio)
    assert row.norm.mean == pytest.approx(own.adapters[-1].norm)
    assert row.effective_rank.mean == pytest.approx(own.adapters[-1].effective_rank)
    assert own.trend is not None
    assert row.gamma.mean == pytest.approx(own.trend.gamma)
    assert row.verdicts == (own.verdict,)
    sizes = [one.stat().st_size for one in (folder / "round-03/clients").glob("*/*.safetensors")]
    assert metrics["bytes_up"] == sum(sizes)
    assert [point.round for point in row.rounds] == [1, 2, 3]
    assert any("runs were already finished" in warning for warning in report.warnings)
    assert json.loads((done / "report.json").read_text())["arms"][1]["arm"] == "raflora-b0.5"


@pytest.mark.long
def test_the_same_options_give_the_same_run_on_processes_too(done: Path, place: Place) -> None:
    from dataclasses import replace

    root = place("again")
    simulate(root, replace(OPTIONS, jobs=2))

    assert files(root) == files(done)


def test_an_interrupted_run_goes_on_from_its_last_whole_round(done: Path, tmp_path: Path) -> None:
    root = shutil.copytree(done, tmp_path / "run")
    folder = Run(ARMS[0], 2e-3, 0).folder(root)
    (folder / "round-03" / "metrics.json").unlink()
    (folder / "round-03" / "global" / "adapter_config.json").write_text("half a file")
    shutil.rmtree(Run(ARMS[1], 2e-3, 0).folder(root) / "round-03")
    first = (folder / "round-02" / "metrics.json").stat().st_mtime_ns

    simulate(root, OPTIONS)

    assert files(root) == files(done)
    assert (folder / "round-02" / "metrics.json").stat().st_mtime_ns == first


def test_more_rounds_arms_and_seeds_go_on_in_the_same_folder(done: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    root = shutil.copytree(done, tmp_path / "run")
    more = replace(OPTIONS, arms=(*ARMS, Arm("residual")), seeds=(0, 1), rounds=4)
    report = simulate(root, more)

    assert {name: one for name, one in files(root).items() if name in files(done)} == files(done)
    assert [row.arm for row in report.arms] == ["flexlora", "raflora-b0.5", "residual"]
    assert all(len(row.rounds) == 4 and row.accuracy.sd is not None for row in report.arms)
    fewer = simulate(root, OPTIONS)
    assert fewer.arms[0].rounds == simulate(done, OPTIONS).arms[0].rounds


def test_another_setting_or_another_folder_is_refused(done: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    other = replace(OPTIONS, setting=replace(SETTING, split=Split(dirichlet=0.1)))
    with pytest.raises(OutputError, match=r"another setting \(dirichlet: 1.0 there, 0.1 now\)"):
        simulate(done, other)
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(OutputError, match="is not a simulation"):
        simulate(tmp_path, OPTIONS)
    with pytest.raises(OutputError, match="cannot be created"):
        simulate(tmp_path / "no/where", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_that_diverges_says_when_and_counts_nowhere(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from fedlora_cli.simulation import course

    train = course.train_client

    def fragile(*args: Any) -> float:
        rate, output = args[4], args[6]
        if rate > 0.5 and "round-02" in str(output):
            raise Diverged(f"{output.name} diverged to NaN or infinity")
        return train(*args)

    monkeypatch.setattr(course, "train_client", fragile)
    root = place("diverging")
    options = replace(OPTIONS, arms=ARMS[:1], rates=(2e-3, 0.6))
    report = simulate(root, options)
    fine, broken = report.arms

    assert fine.best
    assert fine.diverged == ()
    assert not broken.best
    assert broken.diverged == (2,)
    assert broken.accuracy.mean is None
    assert broken.by_seed == (None,)
    monkeypatch.setattr(course, "train_client", None)  # nothing is trained again
    assert simulate(root, options).arms == report.arms


def test_a_file_that_cannot_be_read_is_no_divergence(done: Path, tmp_path: Path) -> None:
    """It is an error, and the run goes on when the file is back."""
    from dataclasses import replace

    root = shutil.copytree(done, tmp_path / "run")
    weights = Run(ARMS[1], 2e-3, 0).folder(root) / "round-03/global/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:300])
    more = replace(OPTIONS, rounds=4)

    with pytest.raises(InputError, match="changed since fedlora wrote it"):
        simulate(root, more)
    weights.write_bytes(content)
    assert simulate(root, more).arms[1].diverged == ()


def test_the_last_round_is_scored_whatever_was_scored_before(place: Place) -> None:
    from dataclasses import replace

    root = place("seldom")
    seldom = replace(OPTIONS, arms=ARMS[:1], score_every=4)
    simulate(root, seldom)
    report = simulate(root, replace(seldom, rounds=2))

    assert report.arms[0].accuracy.mean is not None
    assert [point.accuracy.mean is None for point in report.arms[0].rounds] == [True, False]


def test_a_federation_of_one_rank_is_simulated_too(place: Place) -> None:
    from dataclasses import replace

    alike = replace(OPTIONS, setting=replace(SETTING, ranks=(4, 4, 4)), arms=ARMS[:1], rounds=2)
    (row,) = simulate(place("alike"), alike).arms

    assert row.accuracy.mean is not None
    assert row.energy_ratio.mean == pytest.approx(1.0)


def test_nobody_else_is_at_work_in_the_folder(done: Path) -> None:
    from fedlora_cli.files.alone import alone_in

    with alone_in(done), pytest.raises(OutputError, match="another process is writing there"):
        simulate(done, OPTIONS)


def test_who_is_not_alone_removes_nothing(place: Place) -> None:
    """Not even what another setting left before anything was trained."""
    from dataclasses import replace

    from fedlora_cli.files.alone import alone_in

    root = place("busy")
    (root / "seed-0/start").mkdir(parents=True)
    before = (root / "simulation.json").read_bytes()

    with alone_in(root), pytest.raises(OutputError, match="another process is writing there"):
        simulate(root, replace(OPTIONS, setting=replace(SETTING, participation=0.5)))

    assert (root / "seed-0/start").is_dir()
    assert (root / "simulation.json").read_bytes() == before


def test_a_folder_with_nothing_but_the_lock_is_empty(tmp_path: Path) -> None:
    from fedlora_cli.files.alone import alone_in

    (tmp_path / "run").mkdir()
    with alone_in(tmp_path / "run"):
        pass

    simulate_nothing(tmp_path / "run")

    assert (tmp_path / "run/simulation.json").exists()


def test_what_cannot_be_written_and_what_cannot_be_read_are_told_apart(
    task: Task, done: Path, tmp_path: Path
) -> None:
    with muted():
        model = task.load()
        with starting_from(model, done / "seed-0/start/rank-4") as start:
            (tmp_path / "client").write_text("a file where the folder of the client should be")
            with pytest.raises(OutputError, match=r"client: cannot be written \(file exists\)"):
                train_client(
                    start, task.train, np.arange(8), Training(), 1e-2, 0, tmp_path / "client"
                )
        broken = shutil.copytree(done / "seed-0/start/rank-4", tmp_path / "broken")
        (broken / "adapter_model.safetensors").write_bytes(b"half")
        with (
            pytest.raises(InputError, match="broken: cannot be read"),
            starting_from(model, broken),
        ):
            pass


def test_the_device_is_blamed_for_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from fedlora_cli.simulation.loading import loaded

    def missing() -> Any:
        raise RuntimeError("a layer is missing")

    monkeypatch.setattr(digits, "make_task", lambda *_: SimpleNamespace(load=missing))
    with pytest.raises(RuntimeError, match="a layer is missing"):
        loaded(Source(), tmp_path, "cpu")
    linear = SimpleNamespace(load=lambda: torch.nn.Linear(2, 2))
    monkeypatch.setattr(digits, "make_task", lambda *_: linear)
    with pytest.raises(UsageError, match="--device: abacus cannot be used"):
        loaded(Source(), tmp_path, "abacus")


def test_a_setting_that_was_wrong_is_put_right_in_the_same_folder(place: Place) -> None:
    from dataclasses import replace

    root = place("wrong")
    wrong = replace(OPTIONS, setting=replace(SETTING, ranks=(2, 2, 4, 1000)))
    with pytest.raises(UsageError, match="1000"):
        simulate(root, wrong)

    assert simulate(root, replace(OPTIONS, arms=ARMS[:1], rounds=1)).arms[0].accuracy.mean


def test_one_rate_for_all_and_best_rates_at_an_end_are_warned_of(done: Path, place: Place) -> None:
    from dataclasses import replace

    (alone,) = [w for w in simulate(done, OPTIONS).warnings if "one learning rate" in w]
    assert "--lr" in alone
    several = replace(OPTIONS, arms=ARMS[:1], rates=(2e-3, 4e-3), rounds=1)
    warnings = simulate(place("rates"), several).warnings
    assert "best at an end of the learning rates: flexlora; give more of them" in warnings


def test_a_tie_and_a_divergence_never_make_the_best_rate() -> None:
    from support.simulate_reports import arm

    from fedlora_cli.simulation.summary import _rank, spread

    rows = [
        arm("raflora", rate=4e-3, validation=spread([0.9]), diverged=(2,)),
        arm("raflora", rate=2e-3, validation=spread([0.6])),
        arm("raflora", rate=1e-3, validation=spread([0.6])),
    ]
    assert [row.rate for row in sorted(rows, key=_rank)] == [1e-3, 2e-3, 4e-3]


def test_layers_that_count_what_they_see_carry_nothing_over(tmp_path: Path) -> None:
    """BatchNorm keeps running means in buffers, which no adapter has."""
    from fedlora_cli.simulation.wrapped import buffers_of, restore

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = buffers_of(model)
    model.train()(torch.randn(8, 3) + 5)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])

    restore(model, before)

    assert all(torch.equal(one, before[name]) for name, one in model.named_buffers())


def test_training_leaves_the_base_model_as_it_was(task: Task, done: Path, tmp_path: Path) -> None:
    with muted():
        model = task.load()
        before = {name: one.clone() for name, one in model.state_dict().items()}
        with starting_from(model, done / "seed-0/start/rank-4") as start:
            train_client(start, task.train, np.arange(40), Training(), 1e-2, 0, tmp_path / "client")

    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert not np.allclose(written_update(tmp_path / "client", MODULE), 0)


def test_clients_that_share_a_start_do_not_see_each_other(
    task: Task, done: Path, tmp_path: Path
) -> None:
    mine, place = np.arange(40), done / "seed-0/start/rank-4"
    with muted(), starting_from(task.load(), place) as start:
        for name in ("one", "other"):
            train_client(start, task.train, mine, Training(), 1e-2, 0, tmp_path / name)

    one, other = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "other")
    )
    assert one == other


def test_training_beyond_numbers_is_told(task: Task, done: Path, tmp_path: Path) -> None:
    with (
        muted(),
        starting_from(task.load(), done / "seed-0/start/rank-4") as start,
        pytest.raises(Diverged, match="client diverged to NaN or infinity"),
    ):
        train_client(
            start, task.train, np.arange(40), Training(epochs=3), 1e30, 0, tmp_path / "client"
        )
    assert not (tmp_path / "client").exists()


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fedlora\[simulate\]'"):
        digits.make_task(tmp_path / "base")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arm("ffa"), "freeze A"),
        (lambda: Arm("flexlora", quorum=0.5), "no quorum"),
        (lambda: Arm("fedavg", momentum=0.5), "does not truncate"),
        (lambda: Arm("raflora", momentum=1.0), "--momentum: 1.0 is out of range"),
        (lambda: Setting(participation=0.0), "--participation: 0.0 is out of range"),
        (lambda: Split(dirichlet=0.0), "--dirichlet: 0.0 is out of range"),
        (
            lambda: SimulateOptions(arms=(Arm("raflora"), Arm("raflora"))),
            "--method: a value twice",
        ),
        (lambda: Source(model="x"), "--model: digits has no use for it"),
        (lambda: Source(max_length=9), "--max-length: digits has no use for it"),
        (lambda: Source("causal-lm", "m", ("d",), dtype="float16"), "cannot be trained in"),
        (lambda: Arm("flora"), "merge the whole stack"),
        (lambda: Source("causal-lm", model="x"), "needs both"),
    ],
)
def test_choices_out_of_their_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
