"""Files that are still being written while they are read: a clean error, never a mixture."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import PREFIX, Spec, make
from support.damage import CONFIG, WEIGHTS

from fedlora_cli import AggregateOptions, InputError, aggregate, read
from fedlora_cli.clients.duplicates import digests_of
from fedlora_cli.errors import raise_fault
from fedlora_cli.execution import engine
from fedlora_cli.files.digests import sha256_of
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.files.untrusted import Untrusted, opened
from fedlora_cli.rounds import aggregate as rounds_aggregate

Change = Callable[[Path], object]


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def rewritten(path: Path) -> None:
    """The same size, and the time of modification set back, as only somebody with intent does."""
    status = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of the same size under the same name."""
    (path.parent / "new").write_bytes(path.read_bytes())
    (path.parent / "new").rename(path)


CHANGES: dict[str, Change] = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "touched": touched,
    "rewritten": rewritten,
}


@pytest.mark.parametrize("change", [*CHANGES, "replaced"])
def test_what_changed_since_its_header_was_read_is_refused(tmp_path: Path, change: str) -> None:
    made = make(tmp_path, Spec("a", rank=2))
    adapter = read(made.folder)
    (CHANGES | {"replaced": replaced})[change](made.folder / WEIGHTS)

    with pytest.raises(InputError, match="changed while being read; wait until it is uploaded"):
        adapter.modules["layers.0.q_proj"].read()


def moved_in(path: Path) -> None:
    """Another folder of the same content under the name of the first: no file in it is touched."""
    other = path.parent.with_name("other")
    other.mkdir()
    for one in path.parent.iterdir():
        (other / one.name).write_bytes(one.read_bytes())
        os.utime(other / one.name, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    path.parent.rename(path.parent.with_name("old"))
    other.rename(path.parent)


def linked(path: Path) -> None:
    """A link to another file of the same size and time of modification."""
    replaced(path)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


OTHERS = CHANGES | {"replaced": replaced, "moved in": moved_in, "linked": linked}


@pytest.mark.parametrize("change", OTHERS)
def test_a_digest_is_of_the_bytes_whose_header_was_read(tmp_path: Path, change: str) -> None:
    adapter = read(make(tmp_path, Spec("a", rank=2)).folder)
    before = sha256_of(adapter.weights_file)
    assert digests_of([adapter], 1, engine.quiet(""), raise_fault) == {adapter.path: before}
    OTHERS[change](tmp_path / "a" / WEIGHTS)

    with pytest.raises(InputError, match="changed while being read; wait until it is uploaded"):
        digests_of([adapter], 1, engine.quiet(""), raise_fault)


def test_two_files_that_were_made_at_once_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"12345678")
    with opened(tmp_path / "one") as file:
        one = file.state
    with opened(tmp_path / "two") as file:
        two = file.state

    assert one._replace(modified=0, changed=0) != two._replace(modified=0, changed=0)


def test_an_upload_that_is_replaced_before_its_digest_is_taken_ends_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "round", Spec("a", rank=2)).folder
    really = rounds_aggregate.drop_invalid_clients

    def drop_invalid_clients(*arguments: object) -> object:
        replaced(folder / WEIGHTS)
        return really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds_aggregate, "drop_invalid_clients", drop_invalid_clients)
    with pytest.raises(InputError, match="changed while being read; wait until it is uploaded"):
        aggregate(folder, tmp_path / "out", AggregateOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", ["header", "tensor", "part", "digest", "document"])
def test_what_changes_while_it_is_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, change: str
) -> None:
    made = make(tmp_path, Spec("a", rank=2))
    path = made.folder / (CONFIG if reader == "document" else WEIGHTS)
    entry = read_header(made.folder / WEIGHTS)[f"{PREFIX}layers.0.q_proj.lora_A.weight"]
    readers: dict[str, Callable[[], object]] = {
        "header": lambda: read_header(path),
        "tensor": entry.read,
        "part": entry.part(1, 1).read,
        "digest": lambda: sha256_of(path),
        "document": lambda: read_object(path),
    }
    really = Untrusted.fill

    def fill(file: Untrusted, start: int, buffer: bytearray) -> None:
        monkeypatch.setattr(Untrusted, "fill", really)
        CHANGES[change](file.path)
        really(file, start, buffer)

    monkeypatch.setattr(Untrusted, "fill", fill)
    with pytest.raises(InputError, match="changed while being read; wait until it is uploaded"):
        readers[reader]()


def test_what_was_hashed_is_what_is_read(tmp_path: Path) -> None:
    """A tensor of zeros or of ones, in turn, in a file that is never closed for long."""
    made = make(tmp_path, Spec("a", rank=2, shapes={"q": (2, 50_000)}))
    path, key = made.folder / WEIGHTS, f"{PREFIX}q.lora_A.weight"
    start = read_header(path)[key].start
    uploads = [bytes(400_000), torch.ones(100_000).numpy().tobytes()]
    digests = {}

    def write(number: int) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(uploads[number])

    for number in (0, 1):
        write(number)
        digests[sha256_of(path)] = (float(number),)
    stop = threading.Event()

    def write_again_and_again() -> None:
        for number in itertools.cycle((0, 1)):
            write(number)
            if stop.wait(0.005 * random.random()):
                return

    def found() -> str:
        try:
            entry, digest = read_header(path)[key], sha256_of(path)
            return "same" if digests[digest] == tuple(entry.read().unique().tolist()) else "mixture"
        except InputError as error:
            return error.found

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    try:
        outcomes = {found() for _ in range(50)}
    finally:
        stop.set()
        writer.join()
    assert outcomes <= {"same", "changed while being read"}
    assert "changed while being read" in outcomes
    assert found() == "same"


#: Reads the file for as long as it is cut short and made whole again; a memory map would die here.
READER = """
import sys
from pathlib import Path
from fedlora_cli.errors import InputError
from fedlora_cli.files.digests import sha256_of
from fedlora_cli.files.safetensors import read_header
path = Path(sys.argv[1])
print("ready", flush=True)
for _ in range(3000):
    try:
        read_header(path), sha256_of(path)
    except InputError:
        pass
"""


def test_a_file_that_is_cut_short_all_the_time_kills_nobody(tmp_path: Path) -> None:
    made = make(tmp_path, Spec("a", rank=2, shapes={"q": (2, 5_000)}))
    path = made.folder / WEIGHTS
    whole = path.read_bytes()
    command = [sys.executable, "-c", READER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while process.poll() is None:
            os.truncate(path, 0)
            path.write_bytes(whole)
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (0, b"")
