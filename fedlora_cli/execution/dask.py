"""Dask clusters, on this machine or with a running scheduler. The only module that uses Dask."""

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

#: Seconds to wait for a scheduler to answer, and to have a worker.
_PATIENCE = 10

#: Seconds to wait for a result before checking that there is a worker.
_PAUSE = 1

#: How often Dask repeats a call that failed for other reasons than bad input, such as the network.
_RETRIES = 2


@contextmanager
def on_dask(cluster: str) -> Iterator[Workers]:
    """The workers of a scheduler at tcp:// or tls://, or N new ones for `local:N`, for the block.

    Local workers have one thread each. If a worker is lost, its calls run on another. Raises
    UsageError and ClusterError.
    """
    try:
        import distributed  # noqa: F401 - is it installed?
    except ImportError:
        found, cure = f"{cluster} needs Dask", "pip install 'fedlora[cluster]'"
        raise UsageError("--cluster", found, cure) from None
    kind, _, rest = cluster.partition(":")
    with _muted():
        if kind == "local":
            with _local(int(rest)) as local, _client(cluster, local) as client:
                yield _workers(cluster, client)
        else:
            _check_answer(cluster)
            with _client(cluster, cluster) as client:
                yield _workers(cluster, client)


def _workers(cluster: str, client: Client) -> Workers:
    pool = client.get_executor(pure=False, retries=_RETRIES)
    versions, home = versions_here(), Path.cwd()

    def submit(function: Callable[[Any], Any], item: Any) -> Future[Any]:
        with _present(cluster):
            call: Future[Any] = pool.submit(run_elsewhere, packed((function, item), home), versions)
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
    """The result of a call. Warns once if there are no workers left."""
    warned = False
    while not future.done():
        wait([future], _PAUSE)
        # If the scheduler is lost, the future raises the error.
        with suppress(OSError):
            if warned or future.done() or client.nthreads() or _has_worker(client):
                continue
            warned = True
            cure = "" if cluster.startswith("local") else f": dask worker {cluster}"
            text = f"{cluster}: no worker left; waiting for one{cure}"
            warnings.warn(text, ClusterWarning, stacklevel=2)
    return future.result()


def _has_worker(client: Client) -> bool:
    """Whether there is a worker within `_PATIENCE` seconds."""
    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except (OSError, asyncio.TimeoutError):
        return False
    return True


@contextmanager
def _present(cluster: str) -> Iterator[None]:
    """Raise errors of Dask during a call as a ClusterError."""
    import distributed

    try:
        yield
    except distributed.KilledWorker:
        found = "its workers were killed repeatedly at the same modules"
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

    # A scheduler runs any program that it receives. The certificate, which stays in memory, keeps
    # other users of this machine out.
    secret = distributed.Security.temporary()
    try:
        with _uninterrupted():
            cluster = distributed.LocalCluster(
                n_workers=number,
                threads_per_worker=1,
                memory_limit=0,
                # The default port may be in use.
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
    """Threads and processes that start in this block never receive SIGINT.

    The main thread handles it after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Started later, the tracker would unblock SIGINT again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_answer(cluster: str) -> None:
    """Raise ClusterError if no scheduler answers. Dask's client would wait forever."""
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
    """A client of a scheduler that has at least one worker. Raises ClusterError."""
    import distributed

    with _reached(cluster), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client = distributed.Client(target, timeout=_PATIENCE, set_as_default=False)
    with client:
        for warning in caught:
            if warning.category.__name__ == "VersionMismatchWarning":
                text = " ".join(str(warning.message).split())
                warnings.warn(f"{cluster}: {text}", ClusterWarning, stacklevel=2)
        if not _has_worker(client):
            found = f"the scheduler has no worker for {_PATIENCE} s"
            raise ClusterError(cluster, found, f"start one: dask worker {cluster}")
        yield client


@contextmanager
def _reached(cluster: str) -> Iterator[None]:
    """Raise the errors of a scheduler that does not answer as a ClusterError."""
    try:
        yield
    except asyncio.TimeoutError:
        found = f"no Dask scheduler answers within {_PATIENCE} s"
        raise ClusterError(cluster, found, "start one: dask scheduler") from None
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        found = f"cannot connect to a Dask scheduler ({first_line(error)})"
        cure = "check the address, the protocol and Dask's configuration"
        raise ClusterError(cluster, found, cure) from None


@contextmanager
def _muted() -> Iterator[None]:
    """Switch off Dask's logs in this block. Errors are still raised."""
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
