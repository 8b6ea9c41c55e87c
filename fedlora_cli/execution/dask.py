"""Dask clusters: one of this machine, or one whose scheduler runs already.

Nothing else in the package knows Dask.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.errors import ClusterError, UsageError
from fedlora_cli.execution.calls import packed, run_elsewhere, taken, versions_here
from fedlora_cli.execution.workers import ClusterWarning, Workers
from fedlora_cli.text import first_line

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

#: Seconds within which a scheduler answers, and has a worker.
_PATIENCE = 10

#: Seconds of waiting for a result after which it is asked whether there is a worker.
_PAUSE = 1

#: How often Dask runs a call again that failed by more than bad input: by a network, for example.
_RETRIES = 2


@contextmanager
def on_dask(cluster: str) -> Iterator[Workers]:
    """The workers of the scheduler at tcp:// or tls://, or so many as `local:N` says, one thread
    each, while the block runs. A call whose worker is lost runs again on another one.

    Raises UsageError and ClusterError.
    """
    try:
        import distributed  # noqa: F401 - whether it is there
    except ImportError:
        found, cure = f"{cluster} needs Dask", "pip install 'fedlora[cluster]'"
        raise UsageError("--cluster", found, cure) from None
    kind, _, rest = cluster.partition(":")
    with _hushed():
        if kind == "local":
            with _local(int(rest)) as own, _client(cluster, own) as client:
                yield _workers(cluster, client)
        else:
            _check_answer(cluster)
            with _client(cluster, cluster) as client:
                yield _workers(cluster, client)


def _workers(cluster: str, client: Client) -> Workers:
    pool = client.get_executor(pure=False, retries=_RETRIES)
    own, home = versions_here(), Path.cwd()

    def submit(function: Callable[[Any], Any], item: Any) -> Future[Any]:
        with _present(cluster):
            call: Future[Any] = pool.submit(run_elsewhere, packed((function, item), home), own)
            return call

    def result(future: Future[Any]) -> Any:
        with _present(cluster):
            outcome = _awaited(cluster, client, future)
        return taken(outcome)

    def window() -> int:
        with _present(cluster):
            threads: dict[str, int] = client.nthreads()
        return 2 * max(1, sum(threads.values()))

    return Workers(submit, result, window)


def _awaited(cluster: str, client: Client, future: Future[Any]) -> Any:
    """Its result, and a warning where nobody is there to give it."""
    told = False
    while not future.done():
        wait([future], _PAUSE)
        # What a lost scheduler does to the future is told by the future.
        with suppress(OSError):
            if told or future.done() or client.nthreads() or _has_worker(client):
                continue
            told = True
            cure = "" if cluster.startswith("local") else f": dask worker {cluster}"
            text = f"{cluster}: no worker left; waiting for one{cure}"
            warnings.warn(text, ClusterWarning, stacklevel=2)
    return future.result()


def _has_worker(client: Client) -> bool:
    """Whether there is one, or comes in time."""
    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except (OSError, asyncio.TimeoutError):
        return False
    return True


@contextmanager
def _present(cluster: str) -> Iterator[None]:
    """What Dask raises when a cluster fails us, as a ClusterError."""
    import distributed

    try:
        yield
    except distributed.KilledWorker:
        found = "its workers end again and again at the same modules"
        raise ClusterError(cluster, found, "give them more memory; see their logs") from None
    except (CancelledError, distributed.CancelledError, OSError) as error:
        found = f"the scheduler is lost ({first_line(error)})"
        raise ClusterError(cluster, found, "see its logs, and run the command again") from None
    except ImportError as error:
        found = f"a worker, or the scheduler, cannot import this program ({first_line(error)})"
        cure = "install the same versions on all machines"
        raise ClusterError(cluster, found, cure) from None


@contextmanager
def _local(number: int) -> Iterator[LocalCluster]:
    import distributed

    # Whoever reaches a scheduler runs programs as its owner: others on this machine cannot without
    # the certificate, which never leaves memory.
    secret = distributed.Security.temporary()
    try:
        with _uninterrupted():
            cluster = distributed.LocalCluster(
                n_workers=number,
                threads_per_worker=1,
                memory_limit=0,
                # Its usual port may be somebody's already.
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                security=secret,
                silence_logs=logging.CRITICAL,
            )
    except (RuntimeError, OSError, asyncio.TimeoutError):
        found = "its workers could not start (killed, or too little memory)"
        raise ClusterError(f"local:{number}", found, "give fewer") from None
    with cluster:
        yield cluster


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Threads and processes that begin in the block, and theirs, never see an interruption: it is
    this thread's to handle, after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Where it begins later, it lets interruptions through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_answer(cluster: str) -> None:
    """Whether a scheduler answers there: a client waits for one that is silent without an end.

    Raises ClusterError.
    """
    import distributed
    from distributed.utils import LoopRunner

    async def ask() -> None:
        secret = distributed.Security().get_connection_args("client")
        scheduler = distributed.rpc(cluster, connection_args=secret)
        try:
            await asyncio.wait_for(scheduler.identity(), _PATIENCE)
        finally:
            await scheduler.close_rpc()

    with _reached(cluster):
        LoopRunner().run_sync(ask)


@contextmanager
def _client(cluster: str, target: str | LocalCluster) -> Iterator[Client]:
    """A client of the scheduler, with a worker at least. Raises ClusterError."""
    import distributed

    with _reached(cluster), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        client = distributed.Client(target, timeout=_PATIENCE, set_as_default=False)
    with client:
        for one in told:
            if one.category.__name__ == "VersionMismatchWarning":
                text = " ".join(str(one.message).split())
                warnings.warn(f"{cluster}: {text}", ClusterWarning, stacklevel=2)
        if not _has_worker(client):
            found = f"the scheduler has no worker for {_PATIENCE} s"
            raise ClusterError(cluster, found, f"start one: dask worker {cluster}")
        yield client


@contextmanager
def _reached(cluster: str) -> Iterator[None]:
    """What is raised where no scheduler answers, as a ClusterError."""
    try:
        yield
    except asyncio.TimeoutError:
        found = f"no Dask scheduler answers within {_PATIENCE} s"
        raise ClusterError(cluster, found, "start one: dask scheduler") from None
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        found = f"no Dask scheduler can be asked there ({first_line(error)})"
        cure = "look at its address, its protocol and Dask's configuration"
        raise ClusterError(cluster, found, cure) from None


@contextmanager
def _hushed() -> Iterator[None]:
    """Dask logs nothing here: what goes wrong is raised."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]
    names += ["tornado", "tornado.application", "asyncio"]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
