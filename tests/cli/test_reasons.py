"""What reports say of clients that are left out: nothing of the disk, however paths are spelled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.adapters import Spec, make
from support.cli import run
from support.corpus import CORPUS
from support.damage import CONFIG, WEIGHTS, set_config

from fedlora_cli import AggregateOptions, InputError, aggregate
from fedlora_cli.errors import UsageError
from fedlora_cli.remote import Remote
from fedlora_cli.rounds.preparation import prepare

SKIP = AggregateOptions(on_bad_client="skip")
GOOD = ("ann", "bob", "good")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder whose name stands nowhere else, with a round of three good clients and one."""
    home = tmp_path / "sesame"
    for number, name in enumerate((*GOOD, "bad")):
        make(home / "round", Spec(name, rank=3, samples=10 + number))
    return home


@pytest.mark.parametrize("fault", [one for one in CORPUS if one.startswith(("link: ", "client: "))])
def test_a_reason_says_nothing_of_the_disk(home: Path, fault: str) -> None:
    CORPUS[fault][0](home / "round" / "bad")
    reasons = []
    try:
        task = prepare(home / "round", home / "out", SKIP)
        reasons = [one.reason for one in task.clients.left_out]
    except InputError as error:  # which is about all of them
        reasons = [error.found]
    assert reasons
    for reason in reasons:
        assert not re.search("sesame|/dev|/etc|outside", reason)


def spoiled(home: Path) -> None:
    """Clients at fault in every way in which a reason speaks of a place."""
    folder, secret = home / "round", home / "secret" / "payroll"
    shutil.copytree(folder / "good", folder / "copy")
    (folder / "twin").symlink_to("good")
    secret.mkdir(parents=True)
    make(secret, Spec("x", rank=3))
    (folder / "out").symlink_to(secret / "x")
    for name, made in (("file", WEIGHTS), ("config", CONFIG)):
        shutil.copytree(folder / "bad", folder / name)
        (folder / name / made).unlink()
        (folder / name / made).symlink_to(secret / "x" / made)
    (folder / "bad" / WEIGHTS).unlink()
    os.link(folder / "bob" / WEIGHTS, folder / "bad" / WEIGHTS)
    make(folder, Spec("shape", rank=3, shapes={"layers.0.q_proj": (5, 7)}))
    make(folder, Spec("base", rank=3))
    set_config(folder / "base", base_model_name_or_path="another")
    (folder / "gone").symlink_to("nothing")
    for number in range(8):
        make(folder, Spec(f"fine-{number}", rank=3))


REASONS = {
    "bob": "adapter_model.safetensors: the same file as bad/adapter_model.safetensors",
    "base": "its base model is another, but tiny/base in ann",
    "config": "adapter_config.json: a link that leads out of the folder, to elsewhere",
    "file": "adapter_model.safetensors: a link that leads out of the folder, to elsewhere",
    "gone": "a broken link",
    "good": "adapter_model.safetensors: the same weights as copy, to the last byte",
    "out": "a link that leads out of the folder, to elsewhere",
    "shape": f"{WEIGHTS}: layers.0.q_proj is linear 5 x 7, but linear 12 x 20 in ann",
    "twin": "the same folder as good",
}


def written(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(folder.iterdir())}


SPELLINGS = {
    "absolute": lambda home: (home / "round", home / "out"),
    "relative": lambda home: ("round", "out"),
    "with a dot": lambda home: ("./round/.", "././out"),
    "with a slash": lambda home: ("round/", "out/"),
    "there and back": lambda home: ("round/ann/..", "round/../out"),
    "through a link": lambda home: (home.parent / "link" / "round", home.parent / "link" / "out"),
    "a link to it": lambda home: (home.parent / "linked", "out"),
}


def test_bytes_do_not_depend_on_how_paths_are_spelled(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(home)
    (home.parent / "link").symlink_to(home)
    (home.parent / "linked").symlink_to(home / "round")
    monkeypatch.chdir(home)
    results = {}
    for spelling, places in SPELLINGS.items():
        report = aggregate(
            *places(home), AggregateOptions(on_bad_client="skip", allow_copies=False)
        )
        assert {one.name: one.reason for one in report.left_out} == REASONS
        results[spelling] = written(home / "out")
        shutil.rmtree(home / "out")
    first = results["absolute"]
    assert {name for name, one in results.items() if one != first} == set()
    for content in first.values():
        assert b"sesame" not in content
        assert b"payroll" not in content


def test_a_client_is_named_alike_from_inside_its_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(home / "round" / "ann", of_mine=1)
    aggregate(home / "round" / "ann", home / "out", AggregateOptions())
    first = written(home / "out")
    monkeypatch.chdir(home / "round" / "ann")
    aggregate(".", home / "out", AggregateOptions(force=True))
    assert written(home / "out") == first
    assert any("ann" in one for one in json.loads(first["fedlora.json"])["warnings"])


@pytest.fixture
def memory() -> Iterator[Any]:
    files: Any = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_nothing_local_is_sent_to_object_storage(home: Path, memory: Any) -> None:
    spoiled(home)
    report = aggregate(home / "round", Remote("memory", "bucket/global"), SKIP)

    assert {one.name: one.reason for one in report.left_out} == REASONS
    sent = [content.getvalue() for content in memory.store.values()]
    assert len(sent) == 4
    assert not any(b"sesame" in one or b"payroll" in one for one in sent)
    [document] = [json.loads(one) for one in sent if one.startswith(b'{\n  "schema"')]
    assert {one["path"] for one in document["clients"]} <= {"ann", "bad", "copy"} | {
        f"fine-{number}" for number in range(8)
    }


def test_the_person_is_told_where_a_link_leads(home: Path) -> None:
    spoiled(home)
    (home / "round" / "gone").unlink()
    shutil.rmtree(home / "round" / "config")
    for name in ("twin", "bad", "base", "shape", "copy", "out"):
        one = home / "round" / name
        one.unlink() if one.is_symlink() else shutil.rmtree(one)
    result = run("aggregate", home / "round", "-o", home / "out")
    assert result.exit_code == 3
    assert f"to {home.resolve()}/secret/payroll/x/{WEIGHTS}; put the file itself" in result.stderr


def test_an_earlier_adapter_is_named_without_its_place(home: Path) -> None:
    aggregate(home / "round", home / "before", AggregateOptions())
    (home / "before" / "train_results.json").write_text('{"train_samples": 9}')
    (home / "before" / "fedlora.json").unlink()
    report = aggregate(home / "round", home / "out", AggregateOptions(previous=home / "before"))
    assert [one for one in report.warnings if "is given as a global adapter" in one] == [
        "before is given as a global adapter, but has a sample count like a client"
    ]


@pytest.mark.parametrize("kind", [InputError, UsageError])
def test_an_error_survives_the_way_to_another_process(kind: type[InputError]) -> None:
    import pickle

    place = Path("/srv/round/ann")
    error = kind(Path("x"), f"the same as {place}", "mend it", {place: None})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.found) == (str(error), "the same as ann")
    assert str(error) == "x: the same as /srv/round/ann; mend it"


@pytest.mark.parametrize(
    ("place", "found", "reported"),
    [
        (".", "x.y is a.b in .", "x.y is a.b in here"),
        ("a", "another in a", "another in here"),
        ("/srv/a", "the same file as /srv/a/x.json", "the same file as here/x.json"),
        ("/srv/a", "/srv/ab, but /srv/a, to the last", "/srv/ab, but here, to the last"),
        ("/srv/a (1)*", "as /srv/a (1)* is", "as here is"),
    ],
)
def test_a_place_is_named_where_it_stands_as_a_whole(place: str, found: str, reported: str) -> None:
    error = InputError("x", found, "mend it", {Path(place): None})
    assert error.reported(lambda _: "here") == reported
    assert error.here == found
