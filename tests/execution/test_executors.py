"""In turn, on threads, on processes or on a Dask cluster: the same bytes, and the same errors."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import pickled as executors
from support.adapters import Spec, make
from support.cli import run
from support.digest import OPTIONS, SPECS, digest
from support.pickled import bits
from support.rounds import ROUND, make_round

from fedlora_cli import (
    AggregateOptions,
    ClusterError,
    InputError,
    OutputError,
    UsageError,
    VerificationError,
    aggregate,
    read_clients,
)
from fedlora_cli.aggregation.plan import Plan, PlanParts, make_plan
from fedlora_cli.errors import FedloraError, NotFinite
from fedlora_cli.execution import engine
from fedlora_cli.execution.calls import packed, run_elsewhere, run_here, taken, versions_here
from fedlora_cli.execution.workers import Workers
from fedlora_cli.methods import METHODS
from fedlora_cli.remote import Remote

#: What is in this process or on threads of it is cheap; a process takes seconds to import torch.
CHEAP = ["in turn", "threads", "dask"]
DEAR = pytest.mark.parametrize(
    "name",
    [
        "processes:1",
        *(pytest.param(f"{kind}:2", marks=pytest.mark.long) for kind in ("processes", "local")),
    ],
)

ERRORS: list[FedloraError] = [
    InputError(Path(__file__), "r is -4", "write the rank it was trained with"),
    InputError("samples", "all counts are zero", "give one"),
    NotFinite(Path(__file__).parent, "NaN", "leave it out"),
    UsageError("--rank", "99", "give a smaller one"),
    OutputError(Path("/out"), "is there", "give --force"),
    ClusterError("tcp://a:1", "lost", "see its logs"),
    VerificationError("verification", "off", "report this bug"),
]


#: Dask's web server anywhere but at its usual port, which somebody may have.
NO_PAGE = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a scheduler with two workers, all of them in this process."""
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            scheduler_kwargs=NO_PAGE,
            silence_logs=50,
        )
    with local:
        yield local.scheduler_address


@pytest.fixture(scope="module")
def cheap(scheduler: str) -> Iterator[dict[str, Workers]]:
    with ExitStack() as stack:
        made = {"in turn": (None, 1), "threads": (None, 2), "dask": (scheduler, 0)}
        yield {name: stack.enter_context(engine.executor(*one)) for name, one in made.items()}


@pytest.fixture(params=CHEAP)
def workers(request: pytest.FixtureRequest, cheap: dict[str, Workers]) -> Workers:
    return cheap[request.param]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of a round whose modules LAPACK would split over threads, with a bound on every weight."""
    root = tmp_path_factory.mktemp("plan")
    folders = [one.folder for one in make_round(root, SPECS)]
    options = AggregateOptions(max_weight=0.6, dtype="float64", rank=24, quorum=0.3)
    return make_plan(read_clients(folders).cohort, options)


def by_module(plan: Plan) -> PlanParts:
    return PlanParts(plan, [(name,) for name in plan.modules])


def same_work(workers: Workers, plan: Plan) -> tuple[list[str], list[str]]:
    toys = engine.run(executors.decomposed, range(9), workers)
    return list(toys), list(engine.run(executors.part_digest, by_module(plan), workers))


def test_one_digest_in_turn_on_threads_and_on_dask(cheap: dict[str, Workers], plan: Plan) -> None:
    found = {name: same_work(workers, plan) for name, workers in cheap.items()}

    assert found["threads"] == found["in turn"] == found["dask"]
    assert len(set(found["dask"][0])) == 9


@DEAR
def test_other_processes_give_the_same_bytes_and_errors(name: str, plan: Plan) -> None:
    with engine.executor(None, 1) as alone, engine.executor(name, 0) as workers:
        assert same_work(workers, plan) == same_work(alone, plan)
        assert list(engine.run(executors.cores, range(4), workers)) == [1] * 4
        for dtype in ("bfloat16", "float64", "int64"):
            [found] = engine.run(executors.tensors, [dtype], workers)
            expected = executors.tensors(dtype)
            assert {key: bits(found[key]) for key in expected} == {
                key: bits(expected[key]) for key in expected
            }
        for error in ERRORS:
            with pytest.raises(type(error)) as raised:
                list(engine.run(executors.refused, [error], workers))
            assert (raised.value.path, str(raised.value)) == (error.path, str(error))
        with pytest.raises(ValueError, match="three"):
            list(engine.run(executors.broken, range(1000), workers))


def test_the_whole_command_gives_the_same_bytes_on_a_cluster(
    tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Robust and clipped, so that every stage takes part; with paths that are relative."""
    make_round(tmp_path, SPECS)
    monkeypatch.chdir(tmp_path)
    aggregate("round", "alone", replace(OPTIONS, jobs=1))
    arguments = ["round", "-o", "clustered", "--cluster", scheduler, "--clip-norm", "auto"]
    arguments += ["--robust", "geometric-median", "--max-weight", "0.6", "--dtype", "float64"]

    result = run("aggregate", *arguments, "--rank", "24")

    assert result.exit_code == 0, result.output
    assert digest(tmp_path / "clustered") == digest(tmp_path / "alone")


def test_results_come_in_the_order_of_the_items(workers: Workers) -> None:
    told = []

    results = list(engine.run(executors.square, range(20), workers, lambda *n: told.append(n)))

    assert results == [n * n for n in range(20)]
    assert told == [(n, 20) for n in range(1, 21)]


def test_no_more_calls_than_the_window_are_under_way_or_wait(workers: Workers) -> None:
    begun = 0

    def submit(function: Any, item: Any) -> Any:
        nonlocal begun
        begun += 1
        return workers.submit(function, item)

    counted = replace(workers, submit=submit)
    for taken_before, _ in enumerate(engine.run(executors.square, range(30), counted)):
        assert begun - taken_before <= workers.window()
    assert begun == 30


def test_after_a_failure_nothing_more_is_begun(workers: Workers) -> None:
    begun = []

    def submit(function: Any, item: Any) -> Any:
        begun.append(item)
        return workers.submit(function, item)

    with pytest.raises(ValueError, match="three"):
        list(engine.run(executors.broken, range(1000), replace(workers, submit=submit)))
    assert len(begun) <= 3 + workers.window()


def test_after_a_failure_what_waits_is_cancelled() -> None:
    futures: list[Future[int]] = []

    def submit(function: Any, item: Any) -> Future[int]:
        futures.append(Future())
        return futures[-1]

    def result(future: Future[int]) -> int:
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        list(engine.run(executors.square, range(9), Workers(submit, result, lambda: 4)))
    assert [future.cancelled() for future in futures] == [False, True, True, True]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_ours_is_the_same_error(workers: Workers, error: FedloraError) -> None:
    with pytest.raises(type(error)) as raised:
        list(engine.run(executors.refused, [error], workers))

    assert type(raised.value) is type(error)
    assert (raised.value.path, str(raised.value)) == (error.path, str(error))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "uint8"])
def test_tensors_arrive_bit_by_bit_and_nothing_else_with_them(dtype: str) -> None:
    expected = executors.tensors(dtype)

    call = packed((executors.tensors, dtype))
    found = taken(run_here(call))

    assert {key: bits(found[key]) for key in found} == {key: bits(expected[key]) for key in found}
    assert len(packed(expected["view"])) < 8 * expected["view"].numel() + 500


def test_relative_paths_mean_the_same_file_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "home"

    sent = pickle.loads(packed([Path("a/b"), tmp_path / "c"], home))
    assert sent == [home / "a/b", tmp_path / "c"]
    assert pickle.loads(packed(Path("a/b"))) == Path("a/b")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bounds", [{}, {"max_weight": 0.5}], ids=["free", "bounded"])
def test_a_plan_can_be_sent_and_gives_the_same_weights(
    tmp_path: Path, method: str, bounds: dict[str, float]
) -> None:
    cohort = read_clients([one.folder for one in make_round(tmp_path, ROUND)]).cohort
    quorum = {"quorum": 0.4} if METHODS[method].with_quorum else {}
    plan = make_plan(cohort, AggregateOptions(method=method, **quorum, **bounds))  # type: ignore[arg-type]

    for part, names in PlanParts(plan, [plan.modules[:1], plan.modules[1:]]):
        sent = pickle.loads(packed(part))
        assert sent.modules == tuple(names)
        assert (sent.rank, sent.scale, sent.dtype) == (plan.rank, plan.scale, plan.dtype)
        assert (sent.samples == plan.samples).all()
        for name in names:
            norms = plan.samples + 1
            found, expected = (one.rule(one.holdings(name, norms)) for one in (sent, plan))
            assert (found.clients == expected.clients).all()
            assert sent.shape(name) == plan.shape(name)
            assert sent.layout(name) == plan.layout(name)


def test_what_is_sent_is_as_large_as_its_modules_not_as_the_plan(tmp_path: Path) -> None:
    def sent(modules: int) -> int:
        shapes = {f"layers.{i}.fc": (4, 4) for i in range(modules)}
        root = tmp_path / str(modules)
        folders = [make(root, Spec(f"c{k}", 2, shapes=shapes)).folder for k in range(3)]
        plan = make_plan(read_clients(folders).cohort, AggregateOptions())
        return len(packed(plan.subset(plan.modules[:1])))

    one, many = sent(1), sent(64)
    assert many < 1.05 * one
    assert many < 3 * 2000  # of three clients


def test_a_file_that_a_worker_does_not_see_is_told_as_such(
    tmp_path: Path, cheap: dict[str, Workers]
) -> None:
    found = r"the worker on .* cannot find it; share the folder with all workers .* s3://"
    with pytest.raises(InputError, match=found) as raised:
        list(engine.run(executors.read_whole, [tmp_path / "absent"], cheap["dask"]))
    assert raised.value.path == tmp_path / "absent"


def test_a_copy_that_a_worker_sees_is_told_as_such(tmp_path: Path) -> None:
    error = InputError(tmp_path, "changed while being read", "wait until it is uploaded")

    with pytest.raises(
        InputError, match=r"uploaded; if the worker on .* has a copy, share the folder"
    ):
        taken(run_elsewhere(packed((executors.refused, error)), versions_here()))


def test_what_only_this_process_sees_is_not_sent() -> None:
    sent = pickle.loads(packed(Remote("s3", "bucket/ann")))
    assert sent == Remote("s3", "bucket/ann")
    with pytest.raises(UsageError, match=r"memory://ann is in the memory of this process"):
        packed((executors.read_whole, [Remote("memory", "ann")]), Path.cwd())


def test_a_worker_with_other_versions_is_refused() -> None:
    call = packed((executors.square, 3))

    with pytest.raises(
        ClusterError,
        match=r"the worker has fedlora .*, this machine has .*; install the same versions",
    ):
        taken(run_elsewhere(call, ("fedlora 0.0.1", "torch 1.0", "numpy 1.0")))


@pytest.mark.parametrize(
    "cluster",
    [
        "",
        "head:8786",
        "local",
        "local:0",
        "processes:-1",
        "http://a:1",
        "tcp://a:65536",
        "tcp://a:0",
    ],
)
def test_what_is_no_cluster_is_wrong_usage(cluster: str) -> None:
    with pytest.raises(UsageError, match=r"--cluster: '.*' is not a cluster; give tcp://HOST:PORT"):
        AggregateOptions(cluster=cluster)


def test_dask_that_is_not_installed_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_round(tmp_path, ROUND)
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(UsageError, match=r"needs Dask; pip install 'fedlora\[cluster\]'"):
        aggregate(tmp_path / "round", tmp_path / "out", AggregateOptions(cluster="local:2"))
    assert not (tmp_path / "out").exists()


def test_where_no_scheduler_answers_it_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    dask = pytest.importorskip("fedlora_cli.execution.dask")
    monkeypatch.setattr(dask, "_PATIENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        for name, found in (
            (f"tcp://127.0.0.1:{port}", "no Dask scheduler answers within"),
            (f"tls://127.0.0.1:{port}", "cannot connect to a Dask scheduler"),
        ):
            with pytest.raises(ClusterError, match=found), engine.executor(name, 0):
                pass


def test_a_scheduler_without_workers_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    dask = pytest.importorskip("fedlora_cli.execution.dask")
    monkeypatch.setattr(dask, "_PATIENCE", 0.5)
    none = distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", silence_logs=50, scheduler_kwargs=NO_PAGE
    )
    found = r"has no worker for .*; start one: dask worker tcp"
    with none, pytest.raises(ClusterError, match=found), engine.executor(none.scheduler_address, 0):
        pass


@pytest.mark.parametrize(("workers", "warned"), [({}, 1), ({"tcp://a:2": 1}, 0)])
def test_that_all_workers_are_gone_is_said_once(
    workers: dict[str, int], warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask = pytest.importorskip("fedlora_cli.execution.dask")
    monkeypatch.setattr(dask, "_PAUSE", 0.01)
    future: Future[int] = Future()
    asked = []

    class Cluster:
        def nthreads(self) -> dict[str, int]:
            asked.append(0)
            return workers

        def wait_for_workers(self, number: int, timeout: float) -> None:
            threading.Timer(0.1, future.set_result, [7]).start()
            raise TimeoutError

    if workers:
        threading.Timer(0.1, future.set_result, [7]).start()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert dask._awaited("tcp://a:1", Cluster(), future) == 7
    assert asked
    expected = ["tcp://a:1: no worker left; waiting for one: dask worker tcp://a:1"] * warned
    assert [str(one.message) for one in told] == expected


def test_a_mismatch_that_dask_sees_is_a_warning_of_ours(
    tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_round(tmp_path, ROUND)
    versions = pytest.importorskip("distributed.versions")
    told = {"warning": "Mismatched versions found\n\n| python | 3.9 | 3.11 |", "error": None}
    monkeypatch.setattr(versions, "error_message", lambda *_, **__: told)
    arguments = ["aggregate", str(tmp_path / "round"), "-o", str(tmp_path / "out")]

    result = run(*arguments, "--cluster", scheduler)

    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stderr.splitlines() if "ersion" in line]
    assert line == f"warning: {scheduler}: Mismatched versions found | python | 3.9 | 3.11 |"


@pytest.mark.long
def test_a_worker_of_dask_that_is_killed_changes_nothing(tmp_path: Path, plan: Plan) -> None:
    with engine.executor("local:2", 0) as workers, engine.executor(None, 1) as alone:
        mark = tmp_path / "mark"
        killing = engine.run(executors.killed_once, [mark] * 5, workers)
        assert len(set(killing)) == 1
        assert mark.exists()
        assert same_work(workers, plan) == same_work(alone, plan)


@pytest.mark.long
@pytest.mark.parametrize("name", ["processes:2", "local:2"])
def test_workers_that_end_again_and_again_are_one_line(name: str) -> None:
    lines = pytest.raises(ClusterError, match=rf"^{name}: .*; give")
    with lines, engine.executor(name, 0) as workers:
        list(engine.run(executors.killed, range(4), workers))


@pytest.mark.long
@pytest.mark.parametrize("name", ["processes:2", "local:2"])
def test_workers_end_with_a_parent_that_is_killed(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from fedlora_cli.execution import engine\n"
        "from support import pickled as executors\n"
        "if __name__ == '__main__':\n"
        f"    with engine.executor({name!r}, 0) as workers:\n"
        "        print(*engine.run(executors.process, range(8), workers), flush=True)\n"
        "        sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, script], stdin=-1, stdout=-1, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        children = {int(one) for one in parent.stdout.readline().split()}
        parent.kill()
    assert children
    deadline = time.monotonic() + 120  # against waiting for ever
    while any(executors.lives(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
