"""Signals that arrive between two steps that belong together."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora_cli.files import alone, folder, output, sending
from fedlora_cli.files.disk import temporary_folder
from fedlora_cli.files.interrupts import leaving_at_once, raising, signals_deferred

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")


class Stopped(BaseException):
    """What the handler of SIGTERM raises here."""


@pytest.fixture(autouse=True)
def _stoppable() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stopped("SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


def signalled_after(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; SIGTERM arrives as soon as it has returned."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return result

    return call


def test_a_deferred_signal_arrives_when_the_block_has_ended() -> None:
    steps = []

    def block() -> None:
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            steps.append("the block goes on")

    with pytest.raises(Stopped, match="SIGTERM"):
        block()

    assert steps == ["the block goes on"]
    with pytest.raises(Stopped, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with signals_deferred():
        signal.raise_signal(signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_an_interrupt_in_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def block() -> None:
        with leaving_at_once(), raising():
            Interrupted()
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        block()

    assert capfd.readouterr().err == ""


def lock(target: Path) -> None:
    with alone.alone_at(target):
        raise AssertionError("the block does not begin")


def rehearse(target: Path) -> None:
    folder._rehearse(target)


def new_folder(target: Path) -> None:
    with folder.new_folder(target, force=False, foreign=lambda _: None):
        raise AssertionError("the block does not begin")


def write_file(target: Path) -> None:
    output.write_file(target, b"content")


def upload(target: Path) -> None:
    with sending.temporary_folder("fedlora-", target.parent):
        raise AssertionError("the block does not begin")


@pytest.mark.parametrize(
    ("work", "place", "step"),
    [
        (lock, os, "open"),
        (lock, alone, "_take"),
        (rehearse, tempfile, "mkdtemp"),
        (new_folder, tempfile, "mkdtemp"),
        (write_file, tempfile, "mkdtemp"),
        (upload, tempfile, "mkdtemp"),
    ],
)
def test_a_signal_after_a_temporary_file_is_made_leaves_none(
    work: Callable[[Path], None],
    place: object,
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, step, signalled_after(getattr(place, step)))

    with pytest.raises(Stopped, match="SIGTERM"):
        work(tmp_path / "out")

    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_during_the_removal_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def block() -> None:
        with temporary_folder("new-", tmp_path) as made:
            for name in ("a", "b"):
                (made / name).touch()

    monkeypatch.setattr(os, "unlink", signalled_after(os.unlink))
    with pytest.raises(Stopped, match="SIGTERM"):
        block()

    assert list(tmp_path.iterdir()) == []
