"""Clients whose rows a column or a file fixes: exactly these rows, their ranks, and refusals."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import run
from support.tasks import COLOURS, SUMS, png, save_lines

from fedlora_cli import diagnose, read
from fedlora_cli.errors import InputError, OutputError, UsageError
from fedlora_cli.simulation import course
from fedlora_cli.simulation.arm import Arm
from fedlora_cli.simulation.loading import loaded
from fedlora_cli.simulation.options import Setting, SimulateOptions, Source, Split, Training
from fedlora_cli.simulation.simulate import simulate
from fedlora_cli.simulation.tasks.corpus import read_corpus
from fedlora_cli.simulation.tasks.texts import _WANTED as TEXTS

pytestmark = pytest.mark.usefixtures("apart")

ROOT = Path(__file__).parents[2]

#: Of 30 rows: unequal, out of order, and not in the order of letters.
SITES = ["site-10"] * 4 + ["site-2"] * 9 + ["north"] * 14 + ["site-10"] * 3
IN_ORDER = ["north", "site-2", "site-10"]


def rows(sites: list[Any] = SITES) -> list[dict[str, Any]]:
    """The number in a text is the row."""
    names = sorted(COLOURS)
    return [
        {"text": f"{names[k % 3]} {k} sea", "label": names[k % 3], "site": site}
        for k, site in enumerate(sites)
    ]


Make = Callable[..., Source]


@pytest.fixture
def make(sources: dict[str, Source], tmp_path: Path) -> Make:
    """A source of text with these sites, and a test split unless `held_out`."""

    def source(sites: list[Any] = SITES, *, held_out: bool = False, **options: Any) -> Source:
        files = [str(save_lines(tmp_path / "train.jsonl", rows(sites)))]
        if not held_out:
            # The test split needs no column of clients.
            tests = [{k: v for k, v in row.items() if k != "site"} for row in rows()[:8]]
            files.append(str(save_lines(tmp_path / "test.jsonl", tests)))
        options = options or {"client_column": "site"}
        return replace(sources["text-classification"], data=tuple(files), **options)

    return source


def owned(source: Source) -> dict[str, list[int]]:
    """The rows of each client in the training part."""
    owners = read_corpus(source, TEXTS, 0).train.owners
    assert owners is not None
    result: dict[str, list[int]] = {}
    for name, row in zip(owners.names, owners.rows.tolist(), strict=True):
        result.setdefault(name, []).append(row)
    return result


def of_sites(sites: list[Any] = SITES) -> dict[str, list[int]]:
    return {str(name): [k for k, site in enumerate(sites) if site == name] for name in sites}


# The data of the clients


def test_each_client_has_the_rows_that_the_column_says(make: Make) -> None:
    source = make()
    part = read_corpus(source, TEXTS, 0).train

    assert owned(source) == of_sites()
    assert part.read(np.arange(30))[0] == [row["text"] for row in rows()]
    assert read_corpus(source, TEXTS, 0).remarks == ()
    assert read_corpus(source, TEXTS, 0).test.owners is None
    assert read_corpus(replace(source, client_column=None), TEXTS, 0).train.owners is None


def test_numbers_and_flags_are_names_too(make: Make) -> None:
    numbers = [17 + 3 * (k % 4) for k in range(30)]
    flags = [k % 2 == 0 for k in range(30)]

    assert owned(make(numbers)) == of_sites(numbers)
    assert owned(make(flags)) == of_sites(flags)


def test_without_a_test_split_each_client_gives_about_a_fifth(make: Make) -> None:
    sites = ["ann"] * 60 + ["bob"] * 30 + ["eve"] * 30
    source = make(sites, held_out=True)
    whole, left = of_sites(sites), owned(source)

    assert {name: set(kept) <= set(whole[name]) for name, kept in left.items()} == dict.fromkeys(
        whole, True
    )
    assert sum(map(len, left.values())) == 96
    for name, kept in left.items():
        assert len(kept) == pytest.approx(0.8 * len(whole[name]), abs=1)
    (remark,) = read_corpus(source, TEXTS, 0).remarks
    assert remark == (
        "the clients train on 96 of their 120 rows: the others are held out for the test"
    )


def test_a_limit_is_told(make: Make) -> None:
    corpus = read_corpus(replace(make(), limit=20), TEXTS, 0)

    assert len(corpus.train) == 20
    assert corpus.remarks == (
        "the clients train on 20 of their 30 rows: the others are beyond --limit",
    )


def test_a_file_names_the_rows_and_the_others_are_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("row,client\n7,bob\n3,ann\n29,bob\n0,ann\n1,ann\n")
    source = make(clients_from=str(tmp_path / "split.csv"))

    assert owned(source) == {"ann": [0, 1, 3], "bob": [7, 29]}
    assert read_corpus(source, TEXTS, 0).remarks == (
        f"25 of 30 training rows belong to no client in {tmp_path / 'split.csv'}",
    )


# Refusals


def without(source: Source) -> str:
    with pytest.raises(InputError, match="; ") as caught:
        read_corpus(source, TEXTS, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value).partition(": ")[2]


def test_columns_that_name_no_clients_are_refused(make: Make) -> None:
    some = ["ann", None, "bob"] * 10
    blank = ["ann", "", ""] * 10

    assert without(make(client_column="clinic")) == (
        "no column clinic; name one with --client-column; there are text, label, site"
    )
    assert without(make(some)).startswith("the column site is empty in 10 of 30 rows; leave these")
    assert without(make(blank)).startswith("the column site is empty in 20 of 30 rows")
    assert without(make(["ann"] * 30)) == (
        "the column site has a single client, ann; name a column with two clients or more"
    )
    assert without(make([0.5 * k for k in range(30)])).startswith("the column site holds float64")
    assert without(make([[k] for k in range(30)])).startswith("the column site holds nested values")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b", " ann", "a\tb", "x" * 201])
def test_names_that_no_folder_can_have_are_refused(name: str, make: Make) -> None:
    assert "cannot be the name of a folder" in without(make(["bob", name] * 15))


def test_names_that_some_systems_take_for_one_are_refused(make: Make) -> None:
    assert "the clients Ann and ann differ only in case" in without(make(["ann", "Ann"] * 15))


def test_a_client_without_rows_is_named(make: Make, tmp_path: Path) -> None:
    few = replace(make(["ann"] * 29 + ["bob"]), limit=5)
    assert without(few).startswith("no training rows for bob: all are beyond --limit; give a")
    (tmp_path / "split.json").write_text(json.dumps({"ann": [0, 1], "bob": [30]}))
    listed = make(clients_from=str(tmp_path / "split.json"))
    assert "row 30 of bob, but the training split has 30 rows" in without(listed)
    # A fifth of the rows is held out, so some of these clients have none.
    scarce = make(["ann"] * 5 + [f"site-{k}" for k in range(25)], held_out=True)
    assert "all are held out for the test; give a --test-split" in without(scarce)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Source(client_column="site"), "--client-column: digits has no use for it; give"),
        (lambda: Source(clients_from="x.csv"), "--clients-from: digits has no use for it; give"),
        (
            lambda: Source("causal-lm", "m", ("d",), client_column="a", clients_from="b"),
            "--clients-from: given together with --client-column; give one",
        ),
        (lambda: Setting(ranks=()), "--cohort: 0 is out of range; it must be 1 client or more"),
        *(
            (
                lambda split=split: Setting(
                    Source("causal-lm", "m", ("d",), client_column="a"), split=split
                ),
                f"--{flag}: given together with --client-column; leave it out",
            )
            for flag, split in (
                ("dirichlet", Split(0.5)),
                ("classes", Split(classes=2)),
                ("holdings", Split(holdings=1.0)),
            )
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    build: Callable[[], object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build()


# Whole federations


def save_pictures_of_sites(folder: Path) -> Path:
    """Images with a table that has their classes and clients, as the library reads it."""
    pictures = []
    for k, site in enumerate(SITES):
        name = sorted(COLOURS)[k % 3]
        folder.mkdir(exist_ok=True)
        (folder / f"{k:02}.png").write_bytes(png(COLOURS[name], k))
        pictures.append({"file_name": f"{k:02}.png", "label": name, "site": site})
    return save_lines(folder / "metadata.jsonl", pictures).parent


@pytest.mark.parametrize("family", ["image-classification", "text-classification", "causal-lm"])
def test_each_family_gives_its_clients_their_rows(
    family: str, sources: dict[str, Source], tmp_path: Path
) -> None:
    lists = [row | {"site": site} for row, site in zip(SUMS, SITES, strict=True)]
    data = {
        "image-classification": lambda: save_pictures_of_sites(tmp_path / "pictures"),
        "text-classification": lambda: save_lines(tmp_path / "texts.jsonl", rows()),
        "causal-lm": lambda: save_lines(tmp_path / "sums.jsonl", lists),
    }[family]()
    source = replace(sources[family], data=(str(data),), client_column="site")
    options = replace(options_of(source), seeds=(0,), rounds=1, arms=(Arm("raflora"),))
    report = simulate(tmp_path / "run", options)

    kept = json.loads((tmp_path / "run/clients.json").read_text())
    assert list(kept) == IN_ORDER
    assert report.clients is not None
    for client in report.clients:
        rows_of = kept[client.name]["rows"]
        assert set(rows_of) < set(of_sites()[client.name])
        assert client.samples == len(rows_of)
    assert sum(client.samples for client in report.clients) == 24
    assert report.warnings[0].startswith("the clients train on 24 of their 30 rows: the others are")
    folder = Path(report.arms[0].folders[0]) / "round-01/clients"
    assert sorted(path.name for path in folder.iterdir()) == sorted(IN_ORDER)


def options_of(source: Source, ranks: tuple[int, ...] = (2, 4, 8)) -> SimulateOptions:
    setting = Setting(source, ranks=ranks, participation=1.0, training=Training(batch_size=8))
    arms = (Arm("flexlora"), Arm("raflora"))
    return SimulateOptions(setting, arms, (1e-2,), seeds=(0, 1), rounds=2, jobs=1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The client of each training with its rows, as the words of the batches give them."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    train = course.train_client

    def recorded(start: Any, examples: Any, mine: Any, *rest: Any) -> float:
        words = examples.batch(mine)["input_ids"][:, 1].tolist()  # the token of the row's number
        first = 10  # after the special tokens and the words
        seen.append((rest[-1].name, tuple(word - first for word in words)))
        return train(start, examples, mine, *rest)

    monkeypatch.setattr(course, "train_client", recorded)
    return seen


def test_clients_of_a_column_train_on_their_rows_at_their_ranks(
    make: Make, tmp_path: Path, trained: list[tuple[str, tuple[int, ...]]]
) -> None:
    root, options = tmp_path / "run", options_of(make())
    report = simulate(root, options)

    assert set(trained) == {(name, tuple(kept)) for name, kept in of_sites().items()}
    assert len(trained) == 2 * 2 * 2 * 3  # arms, seeds, rounds, clients
    folder = Path(report.arms[1].folders[1]) / "round-02/clients"
    assert {path.name: read(path).rank for path in folder.iterdir()} == {
        "north": 2, "site-2": 4, "site-10": 8
    }  # fmt: skip
    samples = {
        path.name: json.loads((path / "fedlora.json").read_text()) for path in folder.iterdir()
    }
    assert samples == {name: {"samples": len(kept)} for name, kept in of_sites().items()}
    assert diagnose(report.arms[0].folders[0]).subject == "rounds"
    assert report.clients is not None
    assert [(one.name, one.rank, one.samples) for one in report.clients] == [
        ("north", 2, 14), ("site-2", 4, 9), ("site-10", 8, 7)
    ]  # fmt: skip
    assert report.setting["source"]["client_column"] == "site"
    assert "split" not in report.setting
    kept = json.loads((root / "clients.json").read_text())
    assert kept == {
        name: {"rank": rank, "rows": of_sites()[name]}
        for name, rank in zip(IN_ORDER, (2, 4, 8), strict=True)
    }
    # The file of the run gives the same federation again.
    trained.clear()
    again = replace(make(clients_from=str(root / "clients.json")), client_column=None)
    other = simulate(tmp_path / "again", options_of(again, ()))
    assert other.ranks == (2, 4, 8)
    assert other.clients == report.clients
    assert [row.accuracy for row in other.arms] == [row.accuracy for row in report.arms]
    assert set(trained) == {(name, tuple(rows)) for name, rows in of_sites().items()}
    # The command goes on in the same folder: nothing is left to train.
    trained.clear()
    data = [text for path in make().data for text in ("--data", path)]
    result = run(
        "simulate", "-o", root, "--task", "text-classification", "--model", make().model, *data,
        "--client-column", "site", "--ranks", "2,4,8", "-p", 1, "--batch-size", 8,
        "-m", "flexlora,raflora", "--lr", 1e-2, "--seeds", 2, "--rounds", 2, "-j", 1,
        "--csv", tmp_path / "rounds.csv", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert trained == []
    assert f"wrote: {tmp_path / 'rounds.csv'}" in result.stderr
    assert_that_rows_and_report_agree(tmp_path / "rounds.csv", json.loads(result.stdout))


def assert_that_rows_and_report_agree(rounds: Path, report: dict[str, Any]) -> None:
    """The means over the seeds in the CSV are those in the JSON report."""
    lines = list(csv.DictReader(rounds.read_text().splitlines()))

    assert len(lines) == 2 * 2 * 2  # arms, seeds, rounds
    assert {line["diverged"] for line in lines} == {"false"}
    assert {line["clients"] for line in lines} == {"3"}
    for row in report["arms"]:
        mine = [line for line in lines if line["arm"] == row["arm"]]
        assert {(line["seed"], line["round"]) for line in mine} == {
            (seed, number) for seed in "01" for number in "12"
        }
        for point in row["rounds"]:
            at = [line for line in mine if int(line["round"]) == point["round"]]
            for name in ("accuracy", "energy_ratio", "norm"):
                mean = np.mean([float(line[name]) for line in at])
                assert mean == pytest.approx(point[name]["mean"], rel=1e-12)
        for name in ("bytes_up", "bytes_down", "client_seconds", "server_seconds"):
            assert np.mean([float(line[name]) for line in mine]) == pytest.approx(row[name])
        last = [float(line["accuracy"]) for line in mine if line["round"] == "2"]
        assert last == row["by_seed"]
        assert {float(line["learning_rate"]) for line in mine} == {row["rate"]}


def test_the_commands_of_the_documents_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make().model or "", "bert")
    for name, some in (("train", rows()), ("test", rows()[:8])):
        lines = [",".join(map(str, row.values())) for row in some]
        Path(f"{name}.csv").write_text("\n".join(["text,label,site", *lines]))
    lines = [f"{k},{site}" for k, site in enumerate(SITES)]
    Path("split.csv").write_text("\n".join(["row,client", *lines]))
    text = (ROOT / "fedlora_cli/cli/README.md").read_text()
    block = next(
        one for one in re.findall(r"```text\n(.*?)```", text, re.S) if "--clients-from" in one
    )
    commands = block.strip().splitlines()

    assert len(commands) == 3
    for command in commands:
        short = ("-m", "flexlora", "--rounds", 1, "--seeds", 1, "-p", 1, "-q", "--json")
        result = run(*shlex.split(command)[1:], *short)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["clients"]
        assert [(one["name"], one["rank"], one["samples"]) for one in found] == [
            ("north", 2, 14), ("site-2", 4, 9), ("site-10", 8, 7)
        ]  # fmt: skip
    assert len(list(csv.DictReader(Path("rounds.csv").read_text().splitlines()))) == 1


def test_ranks_that_do_not_fit_the_clients_name_them_in_order(make: Make, tmp_path: Path) -> None:
    for ranks, found in (((2, 4), "2 ranks"), ((2,) * 20, "20 ranks"), ((), "no ranks")):
        expected = rf"--ranks: {found} for 3 clients \(north, site-2, site-10\); give one for each"
        with pytest.raises(UsageError, match=expected):
            simulate(tmp_path / "run", options_of(make(), ranks))


def test_ranks_stand_in_the_file_or_in_the_options(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    lists: dict[str, Any] = {"ann": [0, 1], "bob": [2, 3]}
    file.write_text(json.dumps(lists))
    with pytest.raises(UsageError, match=r"no ranks for 2 clients \(ann, bob\)"):
        simulate(tmp_path / "run", options_of(make(clients_from=str(file)), ()))
    file.write_text(json.dumps({name: {"rank": 2, "rows": r} for name, r in lists.items()}))
    with pytest.raises(UsageError, match=r"--ranks: given, but .*split\.json has ranks; leave out"):
        simulate(tmp_path / "run", options_of(make(clients_from=str(file)), (2, 4)))


def test_other_rows_in_the_same_folder_are_refused(make: Make, tmp_path: Path) -> None:
    one = replace(options_of(make()), arms=(Arm("flexlora"),), seeds=(0,), rounds=1)
    simulate(tmp_path / "run", one)
    before = (tmp_path / "run/clients.json").read_bytes()
    moved = make([*SITES[1:], SITES[0]])
    loaded.cache_clear()  # as in another process

    with pytest.raises(OutputError, match="a simulation whose clients have other rows; give the"):
        simulate(tmp_path / "run", replace(one, setting=replace(one.setting, source=moved)))
    assert (tmp_path / "run/clients.json").read_bytes() == before


def test_a_folder_of_an_older_version_goes_on(make: Make, tmp_path: Path) -> None:
    """Its setting does not have the options of the clients' rows."""
    one = replace(options_of(replace(make(), client_column=None)), seeds=(0,), rounds=1)
    report = simulate(tmp_path / "run", one)
    path = tmp_path / "run/simulation.json"
    document = json.loads(path.read_text())

    assert {"client_column", "clients_from"}.isdisjoint(document["setting"]["source"])
    assert document["setting"]["split"] == {"dirichlet": 1.0, "classes": None, "holdings": 0.0}
    assert simulate(tmp_path / "run", one).arms == report.arms
    assert report.clients is None
