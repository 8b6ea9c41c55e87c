"""Clients and results in object storage: the same work, range by range, one line for what fails."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import Result
from support.adapters import WEIGHTS, Spec, make
from support.cli import run
from support.stores import Store

from fedlora_cli import (
    Adapter,
    AggregateOptions,
    Factors,
    InputError,
    UsageError,
    aggregate,
    location,
    read,
)
from fedlora_cli.clients.duplicates import digests_of
from fedlora_cli.errors import raise_fault
from fedlora_cli.execution import engine
from fedlora_cli.files import untrusted
from fedlora_cli.files.sending import uploaded
from fedlora_cli.remote import Remote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OUTPUT = ("README.md", "adapter_config.json", WEIGHTS, "fedlora.json")
ROUND = "s3://bucket/round"


def error_of(result: Result, code: int) -> str:
    """What the one line of a failure says."""
    [line] = [one for one in result.stderr.splitlines() if not one.startswith("warning: ")]
    assert result.exit_code == code, line
    assert result.stdout == ""
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """Three clients of different ranks, on disk."""
    for number, (name, rank) in enumerate([("ann", 2), ("bob", 3), ("cat", 4)], start=1):
        make(tmp_path / "bucket/round", Spec(name, rank, samples=10 * number))
    return tmp_path / "bucket/round"


@pytest.fixture
def store(clients: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same in a store whose answers have etags."""
    made = Store()
    made.put(clients, "bucket/round")
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: made)
    return made


@pytest.fixture
def memory(clients: Path) -> Iterator[str]:
    """The same in fsspec's own store."""
    files: Any = fsspec.filesystem("memory")
    files.put(str(clients), "/bucket/round", recursive=True)
    yield "memory://bucket"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


# What a name means


@pytest.mark.parametrize("text", ["round-01", "/a/b", "./s3:/a", "C:\\a", "a b:c", "s3:bucket"])
def test_all_that_is_no_url_is_a_path(text: str) -> None:
    assert location(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("s3://bucket/a b/c/", "s3://bucket/a b/c"),
        ("S3://bucket", "s3://bucket"),
        ("gs://bucket/mail@home", "gs://bucket/mail@home"),
        ("s3://arn:aws:s3:eu:1:accesspoint/x", "s3://arn:aws:s3:eu:1:accesspoint/x"),
        (f"hf://org/repo@{COMMIT}", f"hf://org/repo@{COMMIT}"),
        (f"hf://datasets/org/repo@{COMMIT}/a/b", f"hf://datasets/org/repo@{COMMIT}/a/b"),
    ],
)
def test_urls_of_storage(text: str, same: str) -> None:
    place = location(text)
    assert isinstance(place, Remote)
    assert str(place) == same
    assert location(place) == place == pickle.loads(pickle.dumps(place))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf://org/repo", "with all 40 digits"),
        ("hf://org/repo@main", "with all 40 digits"),
        (f"hf://org/repo@{COMMIT[:-1]}", "with all 40 digits"),
        ("s3://", "no address"),
        ("s3://bucket//a", "no address"),
        ("s3://bucket/../a", "no address"),
        ("s3://bucket/a?versionId=3", "a query in the address"),
        ("gs://bucket/a#1", "a query in the address"),
        ("ftp://host/a", "an unknown kind of storage"),
        ("file:///a", "an unknown kind of storage"),
        ("s3://key:SECRET@bucket/a", "credentials"),
        ("s3://key:SEC/RET@bucket/a", "credentials"),
        ("s3://bucket/a?X-Amz-Signature=SECRET", "a query in the address"),
        ("ftp://me:SECRET@host/a", "an unknown kind of storage"),
    ],
)
def test_an_address_that_is_none_or_would_show_a_secret(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        location(text)
    assert "SEC" not in str(caught.value)
    assert error_of(run("inspect", text), 2) == str(caught.value)


def test_a_url_that_was_made_a_path_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the URL as text"):
        aggregate([Path("s3://bucket/round")], tmp_path / "out")


def test_local_paths_need_no_storage_library() -> None:
    code = (
        "import sys; from fedlora_cli.cli.app import app; from fedlora_cli import location;"
        "location('a'); print({'fsspec', 's3fs', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# The same work


def test_one_global_adapter_whether_clients_are_here_or_there(
    clients: Path, memory: str, tmp_path: Path
) -> None:
    here, there, mixed = tmp_path / "here", tmp_path / "there", tmp_path / "mixed"
    assert run("aggregate", clients, "-o", here, "--verify").exit_code == 0
    assert run("aggregate", f"{memory}/round", "-o", there, "--verify").exit_code == 0
    both = (f"{memory}/round/cat", clients / "ann", f"{memory}/round/bob")
    assert run("aggregate", *both, "-o", mixed).exit_code == 0

    for name in OUTPUT[:3]:
        assert (here / name).read_bytes() == (there / name).read_bytes()
        assert (here / name).read_bytes() == (mixed / name).read_bytes()
    rows = json.loads((mixed / "fedlora.json").read_text())["clients"]
    assert [row["path"] for row in rows] == [
        "../bucket/round/ann",
        "memory://bucket/round/bob",
        "memory://bucket/round/cat",
    ]
    known = json.loads((here / "fedlora.json").read_text())["clients"]
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in known]


def test_rounds_that_never_leave_the_store(memory: str, tmp_path: Path) -> None:
    def steps(round_: str, run_: str) -> list[tuple[str, ...]]:
        return [
            ("aggregate", round_, "-o", f"{run_}/g1", "--verify"),
            ("aggregate", round_, "-o", f"{run_}/g2", "--previous", f"{run_}/g1"),
            (
                *("aggregate", round_, "-o", f"{run_}/g3", "--previous", f"{run_}/g2"),
                *("--before-previous", f"{run_}/g1", "--momentum", "0.5"),
            ),
            ("aggregate", round_, "-o", f"{run_}/g1", "--previous", f"{run_}/g1", "--force"),
            ("distribute", f"{run_}/g3", "-o", f"{run_}/next", "--like", round_),
            ("distribute", f"{run_}/g3", "-o", f"{run_}/next", "--like", round_, "--force"),
        ]

    for there, here in zip(
        steps(f"{memory}/round", f"{memory}/run"), steps(f"{memory}/round", str(tmp_path / "run")),
        strict=True,
    ):  # fmt: skip
        (tmp_path / "run").mkdir(exist_ok=True)
        assert run(*there).exit_code == run(*here).exit_code == 0
    files: Any = fsspec.filesystem("memory")
    written = [name.removeprefix("/bucket/run/") for name in files.find("/bucket/run")]
    local = {
        path.relative_to(tmp_path / "run").as_posix(): path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    assert sorted(written) == sorted(local)
    for name in written:
        if not name.endswith("fedlora.json"):  # which says where the clients are
            assert files.cat(f"/bucket/run/{name}") == local[name], name


def test_the_rounds_in_a_store_are_found_by_their_numbers(store: Store) -> None:
    for number in (1, 2, 10):
        output = f"s3://bucket/run/round-{number}/global"
        assert run("aggregate", ROUND, "-o", output, "--rounds", "s3://bucket/run").exit_code == 0
    options = [
        json.loads(store.objects[f"bucket/run/round-{number}/global/fedlora.json"])["options"]
        for number in (1, 2, 10)
    ]
    assert options == [{}, {"--previous": "round-1/global"}, {"--previous": "round-2/global"}]
    done = run("diagnose", "s3://bucket/run", "--json")
    assert [one["path"] for one in json.loads(done.stdout)["adapters"]] == [
        f"s3://bucket/run/round-{number}/global" for number in (1, 2, 10)
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "{}/round"],
        ["inspect", "{}/round", "--values"],
        ["inspect", "{}/global", "--values"],
        ["diagnose", "{}/round"],
        ["diagnose", "{}/global"],
        ["compare", "{}/round", "--previous", "{}/global"],
        ["predict", "{}/round"],
        ["predict", "{}/round", "--samples", "{}/counts.json"],
        ["aggregate", "{}/round", "-o", "{}/unwritten", "--dry-run", "--samples", "{}/counts.json"],
        ["distribute", "{}/global", "-o", "{}/next", "--rank", "1,2"],
    ],
    ids=" ".join,
)
def test_every_command_says_the_same_of_a_store(
    command: list[str], clients: Path, memory: str
) -> None:
    disk = clients.parent
    (disk / "counts.json").write_text('{"ann": 3, "bob": 2, "cat": 1}')
    run("aggregate", clients, "-o", disk / "global")
    files: Any = fsspec.filesystem("memory")
    for name in ("global", "counts.json"):
        files.put(str(disk / name), f"/bucket/{name}", recursive=True)

    here, there = (
        run(*(part.format(root) for part in command), "--json") for root in (disk, memory)
    )

    assert here.exit_code == there.exit_code == 0
    said = there.stdout.replace(memory, str(disk))
    assert _timeless(json.loads(said)) == _timeless(json.loads(here.stdout))


def _timeless(document: Any) -> Any:
    """Without how long something took."""
    if isinstance(document, dict):
        return {
            key: _timeless(value) for key, value in document.items() if not key.endswith("seconds")
        }
    return [_timeless(one) for one in document] if isinstance(document, list) else document


def test_the_last_checkpoint_of_every_client(clients: Path, store: Store, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        for number, source in ((9, "cat"), (10, name)):
            store.put(clients / source, f"bucket/run/{name}/checkpoint-{number}")
    done = run("inspect", "s3://bucket/run", "--adapter", "checkpoint-*", "--json")
    found = [(one["path"], one["rank"]) for one in json.loads(done.stdout)["adapters"]]
    assert found == [
        ("s3://bucket/run/ann/checkpoint-10", 2),
        ("s3://bucket/run/bob/checkpoint-10", 3),
    ]
    assert "give --adapter 'checkpoint-*'" in error_of(run("predict", "s3://bucket/run"), 3)


def test_a_report_tells_a_store_nothing_of_this_disk(
    clients: Path, store: Store, tmp_path: Path
) -> None:
    assert run("aggregate", clients, "-o", "s3://bucket/global").exit_code == 0
    assert store.names("bucket/global") == sorted(OUTPUT)
    for name in OUTPUT:
        assert str(tmp_path).encode() not in store.objects[f"bucket/global/{name}"]
    report = json.loads(store.objects["bucket/global/fedlora.json"])
    assert [row["path"] for row in report["clients"]] == ["ann", "bob", "cat"]


# Few questions, small ranges


def test_headers_take_few_questions_and_one_range(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "_HEAD", 512)
    assert run("predict", ROUND).exit_code == 0

    for name in ("ann", "bob", "cat"):
        own = [(how, key) for how, key in store.asked if f"/{name}" in key]
        assert [one for one in own if one[0] == "ls"] == [("ls", f"bucket/round/{name}")]
        ranges = [key.partition("/round/")[2] for how, key in own if how == "cat_file"]
        assert f"{name}/{WEIGHTS}[0:512]" in ranges  # the length, and all that fits beside it
        assert len(ranges) == 3, ranges  # with the config, and the sample count
        assert len(own) == 10  # before and after each of these, what the file is
    assert len(store.objects[f"bucket/round/cat/{WEIGHTS}"]) > 1024


def test_a_long_header_takes_one_range_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "_HEAD", 16)
    assert run("predict", ROUND).exit_code == 0
    ranges = [key for how, key in store.asked if how == "cat_file" and f"ann/{WEIGHTS}" in key]
    length = int.from_bytes(store.objects[f"bucket/round/ann/{WEIGHTS}"][:8], "little")
    assert [re.findall(r"\d+", one.rpartition("[")[2]) for one in ranges] == [
        ["0", "16"],
        ["8", str(8 + length)],
    ]


def test_tensors_come_in_ranges_and_whole_files_only_for_their_digest(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "_HEAD", 512)
    monkeypatch.setattr(untrusted, "_REMOTE_BLOCK", 700)
    assert run("aggregate", ROUND, "-o", tmp_path / "out").exit_code == 0

    size = len(store.objects[f"bucket/round/cat/{WEIGHTS}"])
    asked = [key for how, key in store.asked if how == "cat_file" and f"cat/{WEIGHTS}" in key]
    ranges = [tuple(map(int, re.findall(r"\d+", one.rpartition("[")[2]))) for one in asked]
    blocks = [(start, min(start + 700, size)) for start in range(0, size, 700)]
    tensors = [one for one in ranges if one not in blocks and one != (0, 512)]
    assert sorted(set(ranges) - set(tensors)) == sorted({*blocks, (0, 512)})
    data = 8 + int.from_bytes(store.objects[f"bucket/round/cat/{WEIGHTS}"][:8], "little")
    assert sum(end - start for start, end in tensors) == size - data  # each byte once


# Files that are not what they were


@pytest.mark.parametrize("bytes_more", [0, 1, -1])
@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json"])
def test_a_file_that_changes_after_its_header_was_read(
    file: str, bytes_more: int, store: Store, tmp_path: Path
) -> None:
    key = f"bucket/round/bob/{file}"

    def change(method: str, asked: str) -> None:
        if method == "cat_file" and asked.startswith(key):
            store.before = lambda method, key: None
            old = store.objects[key]
            later = old[:-2] + bytes([old[-2] ^ 1, old[-1]])
            store.objects[key] = (later + b"    ")[: len(old) + bytes_more]

    store.before = change
    said = error_of(run("aggregate", ROUND, "-o", tmp_path / "out"), 3)
    assert said == f"s3://{key}: changed while being read; wait until it is uploaded"
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_between_header_and_digest(store: Store) -> None:
    adapter = read(location(f"{ROUND}/bob"))
    key = f"bucket/round/bob/{WEIGHTS}"
    assert list(digests_of([adapter], 1, engine.quiet(""), raise_fault).values()) == [
        hashlib.sha256(store.objects[key]).hexdigest()
    ]
    store.objects[key] = store.objects[key][:-1] + b"\1"
    with pytest.raises(InputError, match="changed while being read; wait until it is uploaded"):
        digests_of([adapter], 1, engine.quiet(""), raise_fault)


def test_a_file_that_changes_between_header_and_tensors(store: Store, tmp_path: Path) -> None:
    key = f"bucket/round/bob/{WEIGHTS}"
    seen = []

    def change(method: str, asked: str) -> None:
        if method == "cat_file" and asked.startswith(key):
            seen.append(asked)
            if len(seen) == 3:  # header and digest are known
                old = store.objects[key]
                store.objects[key] = old[:-2] + bytes([old[-2] ^ 1, old[-1]])

    store.before = change
    said = error_of(run("aggregate", ROUND, "-o", "s3://bucket/global"), 3)
    assert said == f"s3://{key}: changed while being read; wait until it is uploaded"
    assert store.names("bucket/global") == []


def test_tensors_are_those_of_the_header_that_was_read(store: Store) -> None:
    adapter = read(location(f"{ROUND}/bob"))
    again = pickle.loads(pickle.dumps(adapter.path))
    key = f"bucket/round/bob/{WEIGHTS}"
    assert torch.equal(_q_proj(adapter).B, _q_proj(read(again)).B)
    store.objects[key] = store.objects[key][:-1] + b"\1"
    with pytest.raises(InputError, match="changed while being read"):
        _q_proj(adapter)
    assert _q_proj(read(again)).B.isfinite().all()


def _q_proj(adapter: Adapter) -> Factors:
    return adapter.modules["layers.0.q_proj"].read()


def test_a_file_that_is_gone(store: Store) -> None:
    def lose(method: str, asked: str) -> None:
        if method == "cat_file":
            store.objects.pop(f"bucket/round/bob/{WEIGHTS}", None)

    store.before = lose
    said = error_of(run("predict", ROUND), 3)
    assert said.startswith(f"s3://bucket/round/bob/{WEIGHTS}: cannot be read (nothing is there")


def test_limits_hold_there_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAX_FILE_BYTES", 1000)
    said = error_of(run("predict", ROUND), 3)
    assert said.startswith("s3://bucket/round/bob/adapter_model.safetensors: 1")
    assert "bytes, more than 1000" in said
    assert not any("[" in key and "/bob/adapter_m" in key for _, key in store.asked)

    monkeypatch.undo()
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: store)
    monkeypatch.setattr("fedlora_cli.clients.discovery.MAX_ENTRIES", 2)
    assert "more than 2 files and folders" in error_of(run("predict", ROUND), 3)


def test_a_damaged_client_is_left_out(store: Store, tmp_path: Path) -> None:
    store.objects[f"bucket/round/bob/{WEIGHTS}"] = b"\x00" * 100
    said = error_of(run("aggregate", ROUND, "-o", tmp_path / "out"), 3)
    assert said.startswith(f"s3://bucket/round/bob/{WEIGHTS}: ")

    done = run("aggregate", ROUND, "-o", tmp_path / "out", "--on-bad-client", "skip")
    assert done.exit_code == 0
    assert f"bob left out: {WEIGHTS}: a header that is not JSON" in done.stderr
    [left_out] = json.loads((tmp_path / "out/fedlora.json").read_text())["left_out"]
    assert left_out["path"] == "s3://bucket/round/bob"


def test_one_upload_under_two_names(store: Store, clients: Path, tmp_path: Path) -> None:
    store.put(clients / "ann", "bucket/round/dan")
    said = error_of(run("aggregate", ROUND, "-o", tmp_path / "out"), 3)
    assert f"dan/{WEIGHTS}: the same weights as s3://bucket/round/ann" in said
    again = error_of(run("predict", f"{ROUND}/ann", f"{ROUND}/ann/"), 3)
    assert again.startswith("s3://bucket/round/ann: the same folder")


@pytest.mark.parametrize("name", ["x?versionId=1", "x#1", "..", "."])
def test_a_name_without_an_address_of_its_own(name: str, store: Store) -> None:
    store.objects[f"bucket/round/ann/{name}"] = b""
    said = error_of(run("predict", ROUND), 3)
    assert f"holds {name!r}, which has no address of its own" in said
    assert said.startswith("s3://bucket/round/ann")


def test_an_empty_object_that_stands_for_a_folder_is_none(store: Store) -> None:
    real = store.ls

    def ls(key: str, *, detail: bool) -> list[dict[str, Any]]:
        marker = {"name": f"{key}/", "size": 0, "type": "file"}
        return [marker, *(real(key, detail=detail) if store.names(key) else [])]

    store.ls = ls  # type: ignore[method-assign]
    assert run("predict", ROUND).exit_code == 0
    assert run("aggregate", ROUND, "-o", "s3://bucket/empty/new").exit_code == 0


# What stores say


class NoCredentialsError(Exception):
    """One of the many that are no OSError."""


REFUSALS = {
    "credentials": (NoCredentialsError("Unable to locate credentials"), "the credentials"),
    "network": (ConnectionError("Could not connect\nto anything"), "the network"),
    "forbidden": (PermissionError("Forbidden"), "the credentials"),
    "silent": (TimeoutError(), "the network"),
    "extra": (ImportError("Install s3fs to access S3"), "pip install 'fedlora[s3]'"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_store_that_does_not_answer_is_one_line(
    refusal: str, clients: Path, store: Store, tmp_path: Path
) -> None:
    error, cure = REFUSALS[refusal]

    def raise_fault(method: str, key: str) -> None:
        raise error

    store.before = raise_fault
    reason = (str(error) or type(error).__name__).splitlines()[0]
    for command in (
        ("aggregate", ROUND, "-o", tmp_path / "out"),
        ("inspect", ROUND),
        ("diagnose", f"{ROUND}/ann"),
        ("compare", clients, "--previous", "s3://bucket/global"),
        ("predict", ROUND),
        ("distribute", "s3://bucket/global", "-o", tmp_path / "out", "--like", clients),
        ("aggregate", clients, "-o", tmp_path / "out", "--samples", "s3://bucket/counts"),
    ):
        said = error_of(run(*command), 3)
        assert re.match(r"s3://bucket/\S+: cannot be read \(", said)
        assert reason in said
        assert cure in said
    for writing in (
        ("aggregate", clients, "-o", "s3://bucket/out"),
        ("distribute", clients / "ann", "-o", "s3://bucket/out", "--rank", "1"),
    ):
        said = error_of(run(*writing), 4)
        assert said.startswith(f"s3://bucket/out: cannot be written ({reason})")
        assert cure in said
    assert not (tmp_path / "out").exists()


def test_a_store_that_answers_no_more(clients: Path, store: Store, tmp_path: Path) -> None:
    """Whichever question is the first one without an answer, the failure is one line."""
    commands = [
        (3, "predict", f"{ROUND}/ann"),
        (3, "inspect", f"{ROUND}/ann", f"{ROUND}/bob", "--values"),
        (3, "diagnose", ROUND, "--jobs", 1),
        (3, "aggregate", ROUND, "-o", tmp_path / "out", "--rounds", "s3://bucket/run"),
        (4, "aggregate", clients, "-o", "s3://bucket/out"),
        (4, "distribute", clients / "ann", "-o", "s3://bucket/out", "--rank", "1"),
    ]
    for code, *command in commands:
        for answered in itertools.count():
            left = iter(range(answered))

            def answer(method: str, key: str, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise ConnectionError("gone")

            store.before = answer
            done = run(*command)
            for key in [one for one in store.objects if one.startswith("bucket/out/")]:
                del store.objects[key]  # which nobody could take back
            if done.exit_code == 0:
                break
            if "inspect" in command:
                assert done.exit_code == 3
                assert "cannot be read (gone)" in done.stderr
            else:
                assert "(gone)" in error_of(done, code)
        assert answered > 5


def test_what_a_library_logs_is_not_printed_besides(store: Store) -> None:
    """Python prints what nobody handles: gcsfs logs a traceback for a network that is not there."""
    log = logging.getLogger(Store.__module__.partition(".")[0])
    log.handlers.clear()
    for _ in range(2):
        assert run("predict", ROUND).exit_code == 0
    assert [type(one) for one in log.handlers] == [logging.NullHandler]


def test_places_that_are_not_there(clients: Path, store: Store) -> None:
    for url in ("s3://nobody/round", "s3://bucket/nothing"):
        said = error_of(run("predict", url), 3)
        assert said.startswith(f"{url}: cannot be read (nothing is there, or no such bucket)")
    said = error_of(run("predict", f"{ROUND}/ann/adapter_config.json"), 3)
    assert said.startswith(f"{ROUND}/ann/adapter_config.json: not a folder")
    for command in (
        ("aggregate", clients, "-o", "s3://nobody/out"),
        ("distribute", clients / "ann", "-o", "s3://nobody/out", "--rank", "1"),
    ):
        assert error_of(run(*command), 4) == (
            "s3://nobody/out: there is no bucket nobody; create it, or correct the address"
        )
    assert "a commit" in error_of(run("aggregate", clients, "-o", f"hf://a/b@{COMMIT}"), 4)


# What is written


def test_an_output_is_replaced_by_force_alone_report_first_and_last(
    clients: Path, store: Store
) -> None:
    command = ("aggregate", ROUND, "-o", "s3://bucket/global")
    assert run(*command).exit_code == 0
    assert "it already exists" in error_of(run(*command), 4)
    store.objects["bucket/global/lora.safetensors"] = b"what another format had"

    store.asked.clear()
    assert run(*command, "--force").exit_code == 0
    changes = [
        f"{how} {key.removeprefix('bucket/global/')}"
        for how, key in store.asked
        if how in ("rm_file", "put_file")
    ]
    assert changes[0] == "rm_file fedlora.json"
    assert changes[-1] == "put_file fedlora.json"
    assert [one.partition(" ")[0] for one in changes] == ["rm_file"] * 5 + ["put_file"] * 4
    assert store.names("bucket/global") == sorted(OUTPUT)


def test_the_report_is_last_whatever_the_others_are_called(store: Store) -> None:
    with uploaded(Remote("s3", "bucket/x"), force=False, foreign=lambda place: None) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "fedlora.json", "lora.safetensors", "sub/z"):
            (folder / name).write_text(name)
    sent = [key for how, key in store.asked if how == "put_file"]
    assert sent[-1] == "bucket/x/fedlora.json"
    assert store.names("bucket/x") == ["a", "fedlora.json", "lora.safetensors", "sub/z"]
    assert not folder.exists()


@pytest.mark.parametrize("name", ["model.bin", "checkpoint-1/adapter_config.json"])
def test_what_is_not_of_an_adapter_is_never_removed(name: str, store: Store) -> None:
    store.objects[f"bucket/global/{name}"] = b""
    before = dict(store.objects)
    said = error_of(run("aggregate", ROUND, "-o", "s3://bucket/global", "--force"), 4)
    assert f"it holds {name.partition('/')[0]}, which is not part of an adapter" in said
    assert store.objects == before


def test_an_output_may_not_stand_among_the_clients(store: Store) -> None:
    places = {f"{ROUND}/global": "inside", ROUND: "inside", "s3://bucket": "contain"}
    for output, where in places.items():
        said = error_of(run("aggregate", ROUND, "-o", output, "--force"), 3)
        assert f"{where} the input" in said


def _failing(method: str, name: str, error: BaseException) -> Callable[[str, str], None]:
    def fail(asked: str, key: str) -> None:
        if asked == method and key.endswith(name):
            raise error

    return fail


def test_an_upload_that_fails_leaves_nothing_that_looks_whole(store: Store) -> None:
    command = ("aggregate", ROUND, "-o", "s3://bucket/global")
    store.before = _failing("put_file", WEIGHTS, OSError("slow down"))
    said = error_of(run(*command), 4)
    assert said.startswith(
        "s3://bucket/global: cannot be written (slow down); nothing is left there; "
    )
    assert store.names("bucket/global") == []

    store.before = lambda method, key: None
    assert run(*command).exit_code == 0
    store.before = _failing("put_file", "fedlora.json", OSError("slow down"))
    assert "nothing is left there" in error_of(run(*command, "--force"), 4)
    assert store.names("bucket/global") == []

    def stuck(method: str, key: str) -> None:
        if (method, key) == ("put_file", f"bucket/global/{WEIGHTS}") or method == "rm_file":
            raise OSError("slow down")

    store.before = stuck
    said = error_of(run(*command), 4)
    assert "; left there: README.md, adapter_config.json, adapter_model.safetensors; " in said
    assert "fedlora.json" not in store.names("bucket/global")


def test_an_interrupted_upload_is_taken_back(store: Store) -> None:
    store.before = _failing("put_file", WEIGHTS, KeyboardInterrupt())
    assert run("aggregate", ROUND, "-o", "s3://bucket/global").exit_code == 130
    assert store.names("bucket/global") == []


def test_what_arrived_is_compared_with_what_was_sent(store: Store) -> None:
    real = store.put_file

    def put_file(path: str, key: str) -> None:
        real(path, key)
        if key.endswith(WEIGHTS):
            store.objects[key] = store.objects[key][:-1]

    store.put_file = put_file  # type: ignore[method-assign]
    said = error_of(run("aggregate", ROUND, "-o", "s3://bucket/global"), 4)
    assert re.search(rf"{WEIGHTS} has (\d+) bytes in the store, not \d+", said)
    assert store.names("bucket/global") == []


def test_one_fresh_look_for_every_call(store: Store, tmp_path: Path) -> None:
    """In Python, one process serves many rounds: what one call saw, the next one asks anew."""
    aggregate(ROUND, tmp_path / "one", AggregateOptions(jobs=1))
    for key in [one for one in store.objects if "/cat/" in one]:
        del store.objects[key]
    report = aggregate([ROUND], "s3://bucket/two", AggregateOptions(jobs=1))
    assert [row.name for row in report.clients] == ["ann", "bob"]
    asked = AggregateOptions(jobs=1, previous=location("s3://bucket/two"))
    assert aggregate([ROUND], tmp_path / "three", asked).options == {"--previous": "two"}


@pytest.mark.long
def test_s3_itself_or_its_double(
    clients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        files: Any = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(str(clients), "bucket/round", recursive=True)
        outputs = (tmp_path / "here", tmp_path / "there", "s3://bucket/global")
        for source, output in zip((clients, ROUND, ROUND), outputs, strict=True):
            assert run("aggregate", source, "-o", output, "--verify").exit_code == 0
        for name in OUTPUT[:3]:
            expected = (tmp_path / "here" / name).read_bytes()
            assert (tmp_path / "there" / name).read_bytes() == expected
            assert files.cat(f"bucket/global/{name}") == expected
        again = ("aggregate", ROUND, "-o", "s3://bucket/global")
        assert "it already exists" in error_of(run(*again), 4)
        assert run(*again, "--force").exit_code == 0
        assert run("inspect", "s3://bucket/global").exit_code == 0
        assert "no bucket nobody" in error_of(run(*again[:-1], "s3://nobody/x"), 4)
        assert "nothing is there" in error_of(run("predict", "s3://nobody/round"), 3)
    finally:
        server.stop()
