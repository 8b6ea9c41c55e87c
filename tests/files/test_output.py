"""The output folder: the same bytes, whole or not at all, and in nobody's way."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.adapters import Spec
from support.outputs import beside, never, whole
from support.rounds import make_round

from fedlora_cli import (
    AggregateOptions,
    DistributeOptions,
    InitOptions,
    InputError,
    OutputError,
    aggregate,
    distribute,
    initialize,
)
from fedlora_cli.execution import engine
from fedlora_cli.files import alone, folder, writing
from fedlora_cli.rounds import aggregate as workflow
from fedlora_cli.rounds import distribution

SAMPLES = Path(__file__).parents[2] / "samples"

#: A name that `tempfile` could have made for the output `out`.
LEFT = ".out.tmp-ab3d_f9h"


def test_same_bytes_for_any_order_of_clients_and_any_number_of_jobs(tmp_path: Path) -> None:
    folders = [one.folder for one in make_round(tmp_path)]
    written = set()
    for number, (order, jobs) in enumerate(
        itertools.product([folders, folders[::-1], folders[2:] + folders[:2]], [1, 2, 5])
    ):
        out = tmp_path / f"out{number}"
        aggregate(order, out, AggregateOptions(jobs=jobs))
        written.add(tuple((path.name, path.read_bytes()) for path in sorted(out.iterdir())))

    assert len(written) == 1
    assert [name for name, _ in written.pop()] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedlora.json",
    ]


@pytest.mark.parametrize("method", ["flexlora", "fedavg"])
def test_same_bytes_for_any_number_of_jobs_on_modules_that_lapack_would_split(
    tmp_path: Path, method: str
) -> None:
    """In float64, where nothing is rounded away; every report as well."""
    shapes = {f"layers.{i}.fc": (333, 257 + i) for i in range(6)}
    make_round(
        tmp_path, [Spec(name, rank=30, samples=9, shapes=shapes) for name in ("a", "b", "c")]
    )
    written = set()
    for number, jobs in enumerate([1, 2, 3, 2]):
        out = tmp_path / f"out{number}"
        aggregate(
            [tmp_path / "round"], out, AggregateOptions(jobs=jobs, method=method, dtype="float64")
        )
        written.add(tuple(path.read_bytes() for path in sorted(out.iterdir())))

    assert len(written) == 1


def test_an_existing_target_needs_force_and_only_adapters_are_replaced(tmp_path: Path) -> None:
    make_round(tmp_path)
    out = tmp_path / "out"
    aggregate([tmp_path / "round"], out, AggregateOptions(method="flexlora"))
    before = (out / "adapter_model.safetensors").read_bytes()

    with pytest.raises(OutputError, match=r"it already exists; .* --force"):
        aggregate([tmp_path / "round"], out)
    assert (out / "adapter_model.safetensors").read_bytes() == before

    aggregate([tmp_path / "round"], out, AggregateOptions(force=True))
    assert (out / "adapter_model.safetensors").read_bytes() != before

    (out / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"it holds thesis\.tex"):
        aggregate([tmp_path / "round"], out, AggregateOptions(force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "round"]


@pytest.mark.parametrize(
    "where", ["round/out", "round", "round/ann", "round/ann/out", ".", "/"], ids=lambda where: where
)
def test_an_output_inside_an_input_is_refused(tmp_path: Path, where: str) -> None:
    make_round(tmp_path)
    relation = "contain" if where in (".", "/") else "be inside"

    with pytest.raises(InputError, match=f"would {relation} the input"):
        aggregate([tmp_path / "round"], tmp_path / where, AggregateOptions(force=True))


def test_a_global_adapter_can_be_renewed_in_place(tmp_path: Path) -> None:
    """Read whole before it is replaced, and only with --force."""
    make_round(tmp_path)
    out = tmp_path / "global"
    aggregate([tmp_path / "round"], out)
    before = (out / "adapter_model.safetensors").read_bytes()

    with pytest.raises(OutputError, match="--force"):
        aggregate([tmp_path / "round"], out, AggregateOptions(previous=out, quorum=0.9))
    client = tmp_path / "round/ann"
    with pytest.raises(InputError, match="inside the input"):
        aggregate([client], client, AggregateOptions(previous=client, force=True))
    aggregate([tmp_path / "round"], out, AggregateOptions(previous=out, quorum=0.9, force=True))
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    from fedlora_cli.rounds import aggregate as workflow

    make_round(tmp_path)
    really = workflow.model_card

    def slow(report):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").touch()
        return really(report)

    monkeypatch.setattr(workflow, "model_card", slow)
    with pytest.raises(OutputError, match="it already exists"):
        aggregate([tmp_path / "round"], tmp_path / "out")

    assert sorted(path.name for path in tmp_path.rglob("*.tex")) == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "round"]


def test_top_level_names_are_targets_that_match_nothing_else(tmp_path: Path) -> None:
    """As a list entry, `fc` would also match `mlp.fc`, which no client adapts.

    So the clients' own configs name it by an expression: PEFT takes it for whole names only.
    """
    import warnings

    from peft import PeftModel

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(6, 6)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.mlp = torch.nn.Linear(5, 4), Mlp()

    shapes = {"fc": (4, 5)}
    own = {"target_modules": "fc"}
    make_round(tmp_path, [Spec(name, rank=2, shapes=shapes, config=own) for name in "ab"])
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(Model(), str(tmp_path / "out"))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"base_model.model.fc"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An adapter that is there already, beside the round that it is of."""
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(method="flexlora"))
    return tmp_path / "out"


def renew(out: Path, stage: engine.Stage = engine.quiet) -> None:
    aggregate([out.with_name("round")], out, AggregateOptions(force=True), stage)


def test_the_report_comes_last_and_knows_the_other_files(tmp_path: Path, monkeypatch) -> None:
    make_round(tmp_path)
    synced: list[str] = []
    really = folder._sync
    monkeypatch.setattr(folder, "_sync", lambda path: (synced.append(path.name), really(path)))

    report = aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(verify=True))

    whole(tmp_path / "out")
    assert report.files == json.loads((tmp_path / "out/fedlora.json").read_text())["files"]
    assert {*synced[:3]} == set(report.files)
    assert synced[3] == "fedlora.json"
    assert synced[4].startswith(".out.tmp-")
    assert synced[5:] == [tmp_path.name]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert times["fedlora.json"] == max(times.values())


def test_a_second_writer_is_refused_before_it_begins(old: Path) -> None:
    before = whole(old)

    with alone.alone_at(old):
        for spelled in (old, old / "../round/../out"):
            with pytest.raises(OutputError, match="another process is writing there; wait for it"):
                aggregate([old.with_name("round")], spelled, AggregateOptions(force=True), never)
        assert beside(old) == {".out.lock"}
    assert whole(old) == before
    assert beside(old) == set()


def test_adapters_handed_out_have_one_writer_as_well(tmp_path: Path) -> None:
    client, start = SAMPLES / "round-01/clinic-b", tmp_path / "start"

    with alone.alone_at(start):
        with pytest.raises(OutputError, match="another process"):
            distribute(client, start, (), DistributeOptions(ranks=(2,)), never)
        with pytest.raises(OutputError, match="another process"):
            initialize(SAMPLES / "base", start, (), InitOptions(ranks=(2,)), never)
    assert list(tmp_path.iterdir()) == []


def test_other_outputs_in_the_same_folder_are_nobody_elses(old: Path) -> None:
    """Even where one name begins like another's temporary folder."""
    theirs = old.with_name(".out.tmp-x.tmp-ab3d_f9h")
    theirs.mkdir()

    with alone.alone_at(old.with_name("other")), alone.alone_at(old.with_name("out.tmp-x")):
        renew(old)
    assert beside(old) == {theirs.name}


def test_a_lock_that_nobody_holds_is_in_nobodys_way(old: Path) -> None:
    old.with_name(".out.lock").touch()

    renew(old)
    assert beside(old) == set()


def test_what_is_no_lock_is_left_as_it_is(old: Path) -> None:
    path = old.with_name(".out.lock")
    path.write_text("notes")
    with pytest.raises(OutputError, match="a file that is not a lock of fedlora; move it away"):
        renew(old)
    assert path.read_text() == "notes"

    path.unlink()
    path.symlink_to(old.with_name("nowhere"))
    with pytest.raises(OutputError, match="cannot be written"):
        renew(old)
    assert beside(old) == {".out.lock"}


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path: Path, monkeypatch) -> None:
    """Its holder ended just then: whoever comes next makes a new one, which must be the same."""
    really = alone._take
    removed = False

    def take(lock: int, place: Path) -> bool:
        nonlocal removed
        if not removed:
            removed = True
            (tmp_path / ".out.lock").unlink()
        return really(lock, place)

    monkeypatch.setattr(alone, "_take", take)
    with alone.alone_at(tmp_path / "out"):
        assert removed
        with pytest.raises(OutputError, match="another process"), alone.alone_at(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_has_one_holder_whatever_others_remove(tmp_path: Path) -> None:
    """Many take and remove it at once; none holds one that has no name any more."""
    inside, most, taken = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, taken
        for _ in range(300):
            with suppress(OutputError), alone.alone_at(tmp_path / "out"):
                with guard:
                    inside, taken = inside + 1, taken + 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == 1
    assert taken > 4
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_the_work_goes_on_and_nothing_is_swept(
    old: Path, monkeypatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    import fcntl

    before = whole(old)
    monkeypatch.setattr(fcntl, "flock", unknown)
    old.with_name(LEFT).mkdir()

    renew(old)
    assert whole(old) != before
    assert beside(old) == {LEFT}


def test_what_killed_runs_left_is_swept(old: Path) -> None:
    for name, files in (
        (LEFT, ["adapter_model.safetensors", ".tmpA1b2C3"]),
        (".out.tmp-00000000", ["adapter_config.json", "fedlora.json"]),
        (".out.tmp-00000000.old", ["adapter_config.json"]),
        (".out.tmp-________", []),
    ):
        old.with_name(name).mkdir()
        for file in files:
            (old.with_name(name) / file).touch()
    old.with_name(".out.tmp-0000").touch()
    old.with_name(".out.tmp-0000_txt").touch()

    renew(old)
    whole(old)
    assert beside(old) == {".out.tmp-0000", ".out.tmp-0000_txt"}


def test_what_killed_runs_left_of_a_folder_of_adapters_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".start.tmp-ab3d_f9h/rank-2").mkdir(parents=True)
    (tmp_path / ".start.tmp-ab3d_f9h/rank-2/.tmpA1b2C3").touch()

    distribute(SAMPLES / "round-01/clinic-b", tmp_path / "start", (), DistributeOptions(ranks=(2,)))
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_nothing_foreign_is_swept(old: Path) -> None:
    theirs = old.with_name("theirs")
    (theirs / "deep").mkdir(parents=True)
    (theirs / "adapter_config.json").touch()
    (theirs / "deep/.tmpA1b2C3").touch()
    old.with_name(LEFT).symlink_to(theirs)
    held = old.with_name(".out.tmp-00000000")
    held.mkdir()
    (held / "thesis.tex").touch()
    linked = old.with_name(".out.tmp-11111111")
    linked.mkdir()
    (linked / "deep").symlink_to(theirs / "deep")
    for name in (".out.tmp-22222222.bak", ".out.tmp-2222222", "out.tmp-22222222", ".outtmp"):
        old.with_name(name).mkdir()
    old.with_name(".out.tmp-zzzzzzzz").touch()
    before = sorted(old.parent.rglob("*"))

    renew(old)
    assert sorted(old.parent.rglob("*")) == before


def test_an_adapter_that_was_being_replaced_gets_its_place_back(old: Path) -> None:
    """Killed between two steps, where names cannot be exchanged: it is the only whole one."""
    content = whole(old)
    old.rename(old.with_name(LEFT + ".old"))
    old.with_name(LEFT).mkdir()
    (old.with_name(LEFT) / "adapter_config.json").touch()

    with pytest.raises(OutputError, match="it already exists"):
        aggregate([old.with_name("round")], old)
    assert whole(old) == content
    assert beside(old) == set()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_replacement_in_two_steps_can_be_stopped_anywhere(
    old: Path, monkeypatch, step: int
) -> None:
    """By a signal, which is an exception, after each of its renamings."""
    before = whole(old)
    count = 0
    really = Path.rename

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        result = really(self, target)
        if count == step:
            raise SystemExit(143)
        return result

    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(SystemExit):
        renew(old)
    monkeypatch.undo()

    assert (whole(old) == before) == (step == 1)
    renew(old)
    whole(old)
    assert beside(old) == set()


def test_a_signal_while_the_old_folder_is_removed_waits_until_it_is_gone(
    old: Path, monkeypatch
) -> None:
    def stop(*_: object) -> None:
        raise SystemExit(143)

    really = os.unlink
    asked = False

    def unlink(*args: Any, **kwargs: Any) -> None:
        nonlocal asked
        really(*args, **kwargs)
        if not asked and str(args[0]).startswith("adapter"):
            asked = True
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "unlink", unlink)
    before = signal.signal(signal.SIGTERM, stop)
    with pytest.raises(SystemExit):
        renew(old)
    signal.signal(signal.SIGTERM, before)

    assert asked
    whole(old)
    assert beside(old) == set()


def test_too_little_space_is_known_before_the_work(old: Path, monkeypatch) -> None:
    before = whole(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))

    with pytest.raises(OutputError, match=r"out: [0-9,]+ bytes needed, 1,000 free"):
        renew(old, never)
    assert whole(old) == before
    assert beside(old) == set()

    # What tells nothing refuses nothing.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    with pytest.raises(AssertionError, match="reading clients has begun"):
        renew(old, never)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_the_space_that_is_asked_for_is_what_the_weights_take(tmp_path: Path, monkeypatch) -> None:
    head = {"head.weight": torch.zeros(30, 40)}
    make_round(
        tmp_path,
        [Spec(name, rank, tensors=head, config=SAVED) for name, rank in (("ann", 2), ("bob", 5))],
    )
    asked: list[int] = []
    for module in (workflow, distribution):
        monkeypatch.setattr(module, "check_space", lambda target, needed: asked.append(needed))

    for options in (
        AggregateOptions(),
        AggregateOptions(rank=3, dtype="bfloat16"),
        AggregateOptions(energy=0.9),
    ):
        aggregate([tmp_path / "round"], tmp_path / "out", replace(options, force=True))
        assert asked.pop() == tensor_bytes(tmp_path / "out")
        if options.energy is not None:  # before its rank is known, whether there is any room
            assert asked.pop() == 0
    distribute(tmp_path / "out", tmp_path / "start", (), DistributeOptions(ranks=(2, 4)))
    start = InitOptions(ranks=(2, 4), target_modules=("fc1", "q_proj"))
    initialize(SAMPLES / "base", tmp_path / "init", (), start)

    assert asked == [
        sum(map(tensor_bytes, (tmp_path / "start").iterdir())),
        sum(map(tensor_bytes, (tmp_path / "init").iterdir())),
    ]


SAVED = {"modules_to_save": ["head"]}


def tensor_bytes(adapter: Path) -> int:
    """What stands behind the header of its weights."""
    content = (adapter / "adapter_model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def failing(number: int, really: Any = None) -> Callable[..., Any]:
    """A refusal; of `really`, if that is given, only where a lock is concerned."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        if really is None or str(args[0]).endswith(".lock"):
            raise OSError(number, os.strerror(number))
        return really(*args, **kwargs)

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(
    "place",
    [(os, "fsync"), (tempfile, "mkdtemp"), (Path, "chmod"), (writing, "new_file"), (os, "open")],
    ids=lambda place: place[1],
)
def test_what_the_system_refuses_leaves_the_old_adapter(
    old: Path, monkeypatch, place: tuple[object, str], number: int
) -> None:
    before = whole(old)
    monkeypatch.setattr(*place, failing(number, os.open if place[1] == "open" else None))

    with pytest.raises(OutputError) as caught:
        renew(old)
    monkeypatch.undo()
    assert caught.value.found == f"cannot be written ({os.strerror(number).lower()})"
    assert whole(old) == before
    assert beside(old) == set()


def test_a_rename_that_is_refused_leaves_the_old_adapter(old: Path, monkeypatch) -> None:
    before = whole(old)
    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing(errno.EBUSY))

    with pytest.raises(OutputError, match="device or resource busy"):
        renew(old)
    assert whole(old) == before
    assert beside(old) == set()


def test_a_limit_on_the_size_of_files_is_an_error_and_no_signal(old: Path) -> None:
    resource = pytest.importorskip("resource")
    before = whole(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(.*file too large"):
            renew(old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole(old) == before
    assert beside(old) == set()


@pytest.fixture
def small_disk(old: Path) -> Iterator[Path]:
    """The adapter `out` on a disk of its own, with 4 KiB left."""
    disk = old.with_name("disk")
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("no disk can be mounted here")
    try:
        shutil.copytree(old, disk / "out")
        (disk / "round").symlink_to(old.with_name("round"))
        free = shutil.disk_usage(disk).free
        (disk / "full").write_bytes(bytes(free - 4096))
        yield disk / "out"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_the_old_adapter(small_disk: Path, monkeypatch) -> None:
    before = whole(small_disk)

    with pytest.raises(OutputError, match="bytes needed, 4,096 free"):
        renew(small_disk)
    monkeypatch.setattr(workflow, "check_space", lambda target, needed: None)
    with pytest.raises(OutputError, match="no space left on device"):
        renew(small_disk)
    assert whole(small_disk) == before
    assert beside(small_disk) == {"full"}

    (small_disk.with_name("full")).unlink()
    renew(small_disk)
    assert whole(small_disk) != before


def test_a_disk_that_may_only_be_read_is_refused_before_the_work(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.parent)], check=True)

    with pytest.raises(OutputError, match="not writable; check its permissions"):
        renew(small_disk, never)
    with pytest.raises(OutputError, match="read-only file system"):
        renew(small_disk.with_name("new"), never)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "not the name of a folder"),
        ("..", "not the name of a folder"),
        ("link", "a symbolic link"),
        ("thesis", "it holds chapter-1.tex, which is not part of an adapter"),
        ("file", "a file of that name exists"),
        ("file/out", "is not a folder"),
        ("none/out", "its parent folder does not exist"),
    ],
)
def test_what_is_no_place_for_an_output_is_refused_before_the_work(
    old: Path, monkeypatch, name: str, message: str
) -> None:
    empty = old.with_name("empty")
    (empty / "in").mkdir(parents=True)
    (empty / "in/link").symlink_to(old)
    (empty / "in/thesis").mkdir()
    (empty / "in/thesis/chapter-1.tex").touch()
    (empty / "in/file").touch()
    before = sorted(old.parent.rglob("*"))
    monkeypatch.chdir(empty / "in")

    with pytest.raises(OutputError, match=message):
        aggregate([old.with_name("round")], name, AggregateOptions(force=True), never)
    assert sorted(old.parent.rglob("*")) == before
