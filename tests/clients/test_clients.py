"""Who takes part in an aggregation: clients at fault, counts by their own word, copies, places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import PREFIX, Spec, make
from support.cli import run
from support.corpus import CORPUS
from support.damage import CONFIG, WEIGHTS, Damage, set_config, set_tensors, with_value

import fedlora_cli as fedlora
from fedlora_cli import AggregateOptions, InputError, UsageError, aggregate, read_clients
from fedlora_cli.rounds.aggregate import execute
from fedlora_cli.rounds.preparation import prepare

GOOD = ("ann", "bob", "good")
SKIP = AggregateOptions(on_bad_client="skip")
Q = "layers.0.q_proj"


def assert_one_result(one: Path, other: Path) -> None:
    """What two commands wrote, but for the metadata, which say what was asked for."""
    tensors, expected = (load_file(place / WEIGHTS) for place in (one, other))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (one / CONFIG).read_text() == (other / CONFIG).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good clients and one of which every test makes what it wants."""
    folder = tmp_path_factory.mktemp("whole") / "round"
    for number, name in enumerate((*GOOD, "bad")):
        make(folder, Spec(name, rank=3, samples=10 + number))
    return folder


@pytest.fixture
def clients(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "round")


def left_out(clients: Path, **options: Any) -> dict[str, str]:
    """Who is left out by what headers show, and why; the others take part."""
    task = prepare(
        clients, clients.parent / "out", AggregateOptions(on_bad_client="skip", **options)
    )
    assert len(task.plan.cohort.names) >= len(GOOD)
    return {one.name: one.reason for one in task.clients.left_out}


# Clients at fault


#: All faults that depend on the other clients, and some of those that are one folder's own.
FAULTS = [
    *(
        one
        for one in CORPUS
        if one.startswith(("link: ", "client: ")) and not one.startswith("client: names that ")
    ),
    *[one for one in CORPUS if one.startswith(("container: ", "config: ", "factors: "))][::8],
]


@pytest.mark.parametrize("fault", FAULTS)
def test_skip_leaves_out_whoever_is_refused_otherwise(clients: Path, fault: str) -> None:
    CORPUS[fault][0](clients / "bad")
    with pytest.raises(InputError) as refusal:
        prepare(clients, clients.parent / "out", AggregateOptions())

    reasons = left_out(clients)

    assert len(reasons) == 1
    assert next(iter(reasons)).isprintable()
    # Of two hard links, nobody can tell which was there first.
    assert not reasons.keys() & set(GOOD) or "hard link" in fault
    assert any(refusal.value.found in reason for reason in reasons.values())


@pytest.mark.parametrize("fault", [one for one in CORPUS if one.startswith("values: ")])
def test_values_are_looked_at_before_anything_is_aggregated(clients: Path, fault: str) -> None:
    CORPUS[fault][0](clients / "bad")
    out = clients.parent / "out"

    report = aggregate(clients, out, SKIP)
    shutil.rmtree(clients / "bad")
    without = aggregate(clients, clients.parent / "without", AggregateOptions())

    assert [one.name for one in report.left_out] == ["bad"]
    assert_one_result(out, clients.parent / "without")
    first, second = (vars(one) for one in (report, without))
    # What was asked for and who was left out are part of the report.
    assert {part for part in first if first[part] != second[part]} <= {
        "files",
        "options",
        "left_out",
        "output",
        "seconds",
    }


@pytest.mark.parametrize("fault", [one for one in CORPUS if one.startswith("client: names that ")])
def test_of_two_that_have_one_name_neither_displaces_the_other(clients: Path, fault: str) -> None:
    CORPUS[fault][0](clients / "bad")

    with pytest.raises(InputError, match="a client named almost like"):
        prepare(clients, clients.parent / "out", SKIP)


def test_one_name_in_two_folders_ends_the_round(clients: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", Spec("ann", rank=2, samples=10))

    with pytest.raises(InputError, match="a client named ann"):
        prepare([clients, tmp_path / "other"], tmp_path / "out", SKIP)


def test_a_folder_that_is_named_twice_takes_part_once(clients: Path, tmp_path: Path) -> None:
    again = tmp_path / "round/../round/ann"
    for given in ([clients, clients / "ann"], [again, clients], [clients / "ann"] * 2):
        with pytest.raises(InputError, match="the same folder as"):
            prepare(given, tmp_path / "out", AggregateOptions())
        task = prepare(given, tmp_path / "out", SKIP)
        assert "ann" in task.plan.cohort.names
        assert task.clients.left_out == ()

    (clients / "link").symlink_to("ann")
    assert set(left_out(clients)) == {"link"}


def test_a_client_that_changes_after_its_header_was_read_is_left_out(clients: Path) -> None:
    task = prepare(clients, clients.parent / "out", SKIP)
    with (clients / "bad" / WEIGHTS).open("r+b") as file:
        file.truncate(400)

    report = execute(task)

    assert [(one.name, one.reason) for one in report.left_out] == [
        ("bad", f"{WEIGHTS}: changed while being read")
    ]
    assert [row.name for row in report.clients] == sorted(GOOD)


def test_nobody_is_left_out_in_silence(clients: Path, tmp_path: Path) -> None:
    set_config(clients / "bad", r=-4)

    arguments = ("aggregate", clients, "-o", tmp_path / "out", "--on-bad-client", "skip")
    said = run(*arguments)
    document = json.loads((tmp_path / "out/fedlora.json").read_text())
    quiet = run(*arguments, "--quiet", "--force")

    reason = "adapter_config.json: r is -4"
    expected = {"name": "bad", "path": "../round/bad", "reason": reason}
    assert said.exit_code == quiet.exit_code == 0
    assert f"warning: bad left out: {reason}\n" in said.stderr
    assert "--on-bad-client skip" in said.stderr.splitlines()[-1]
    assert quiet.stderr == f"warning: bad left out: {reason}\n"
    assert quiet.stdout == ""
    assert document["left_out"] == [expected]
    assert f"- left out: bad: {reason}" in (tmp_path / "out/README.md").read_text()


def test_too_few_that_are_left_are_an_error(clients: Path, tmp_path: Path) -> None:
    set_config(clients / "bad", r=-4)
    with_value(float("nan"))(clients / "ann")
    before = sorted(tmp_path.iterdir())

    arguments = ("aggregate", clients, "-o", tmp_path / "out", "--on-bad-client", "skip")
    headers = run(*arguments, "--min-clients", 4)
    values = run(*arguments, "--min-clients", 3)
    shutil.rmtree(clients / "bad")
    without_skip = run("aggregate", clients, "-o", tmp_path / "out", "--min-clients", 4)

    assert headers.exit_code == values.exit_code == without_skip.exit_code == 3
    assert "only 3 of 4 clients; bad is left out: adapter_config.json: r is -4" in headers.stderr
    assert "--min-clients 3: only 2 of 4 clients; " in values.stderr
    assert "--min-clients 4: only 3 of 3 clients; " in without_skip.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert run(*arguments, "--min-clients", 2).exit_code == 0


def test_with_nobody_left_the_first_reason_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        set_config(make(tmp_path / "round", Spec(name, rank=2)).folder, r=0)

    with pytest.raises(InputError, match=r"only 0 of 2 clients; a is left out: .* r is 0"):
        prepare(tmp_path / "round", tmp_path / "out", SKIP)


def with_bias(folder: Path) -> None:
    set_tensors(folder, lambda t: t.update({f"{PREFIX}norm.bias": torch.ones(12)}))


def saved_in_full(folder: Path) -> None:
    """q_proj as a module that was trained in full, where the others have factors of it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            del tensors[f"{PREFIX}{Q}.lora_{side}.weight"]
        tensors[f"{PREFIX}{Q}.weight"] = torch.ones(12, 20)

    set_tensors(folder, change)
    set_config(folder, modules_to_save=["q_proj"])


def another_shape(folder: Path) -> None:
    A = torch.ones(3, 99)
    set_tensors(folder, lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": A}))


#: Ways to be unlike the others.
MISFITS: dict[str, Damage] = {
    "shape": another_shape,
    "base": lambda folder: set_config(folder, base_model_name_or_path="other"),
    "revision": lambda folder: set_config(folder, revision="other"),
    "bias": with_bias,
    "saved": saved_in_full,
}


@pytest.mark.parametrize("kind", MISFITS)
def test_those_that_are_not_as_most_are_left_out_whatever_their_names(
    clients: Path, kind: str
) -> None:
    """`bad` comes after `ann` and `bob`, and `a` before all: neither decides who is right."""
    for name in (*GOOD, "bad"):
        set_config(clients / name, revision="main", bias="all")
    MISFITS[kind](clients / "bad")
    (clients / "bad").rename(clients / "a")

    assert set(left_out(clients)) == {"a"}


@pytest.mark.parametrize("kind", MISFITS)
def test_one_that_is_as_usual_is_at_fault_where_the_others_are_not(
    clients: Path, kind: str
) -> None:
    for name in (*GOOD, "bad"):
        set_config(clients / name, revision="main", bias="all")
    for name in GOOD:
        MISFITS[kind](clients / name)

    assert set(left_out(clients)) == {"bad"}


@pytest.mark.parametrize("kind", MISFITS)
def test_without_a_majority_nobody_is_left_out(clients: Path, kind: str) -> None:
    for name in (*GOOD, "bad"):
        set_config(clients / name, revision="main", bias="all")
    for name in ("ann", "bad"):
        MISFITS[kind](clients / name)

    with pytest.raises(
        InputError, match="no client is left out, because the others are no majority"
    ):
        prepare(clients, clients.parent / "out", SKIP)


def k_proj_too(folder: Path, rows: int) -> None:
    """A module that most do not adapt, with an update of so many rows."""
    name = f"{PREFIX}layers.0.k_proj"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.lora_A.weight"] = torch.ones(3, 20)
        tensors[f"{name}.lora_B.weight"] = torch.ones(rows, 3)

    set_tensors(folder, add)
    set_config(folder, target_modules=["q_proj", "k_proj", "v_proj"])


def test_one_against_one_is_nobodys_fault_however_many_say_nothing(clients: Path) -> None:
    """The first by name is not right because of that."""
    k_proj_too(clients / "good", 7)
    k_proj_too(clients / "bad", 9)
    with pytest.raises(InputError, match=r"good.*k_proj is .* the others are no majority"):
        prepare(clients, clients.parent / "out", SKIP)

    k_proj_too(clients / "bad", 7)
    k_proj_too(clients / "ann", 9)
    assert set(left_out(clients)) == {"ann"}


def test_one_revision_against_one_other_is_nobodys_fault(clients: Path) -> None:
    for name, revision in (("bad", "v2"), ("good", "v1")):
        set_config(clients / name, revision=revision)
    with pytest.raises(InputError, match=r"its revision is v1, .* the others are no majority"):
        prepare(clients, clients.parent / "out", SKIP)

    # Who is at fault for something else has no say in it.
    set_config(clients / "bad", base_model_name_or_path="other")
    assert set(left_out(clients)) == {"bad"}


def test_who_is_at_fault_is_asked_again_once_some_are_gone(tmp_path: Path) -> None:
    """Of seven, two are of another revision; without them, three of five are of one base."""
    for name, base, revision in (
        ("a", "x", "two"),
        ("b", "x", "two"),
        ("c", "x", "one"),
        ("d", "x", "one"),
        ("e", "y", "one"),
        ("f", "y", "one"),
        ("g", "y", "one"),
    ):
        fields = {"base_model_name_or_path": base, "revision": revision}
        make(tmp_path / "round", Spec(name, rank=2, config=fields))

    with pytest.raises(InputError, match="no majority"):
        prepare(tmp_path / "round", tmp_path / "out", SKIP)

    shutil.rmtree(tmp_path / "round/b")
    shutil.rmtree(tmp_path / "round/d")
    task = prepare(tmp_path / "round", tmp_path / "out", SKIP)
    assert task.plan.cohort.names == ("e", "f", "g")


@pytest.mark.parametrize("values", [(1, 0, 0, 0), (1, 1, 0, 0)])
def test_base_weights_must_be_those_of_most(tmp_path: Path, values: tuple[int, ...]) -> None:
    for name, value in zip("abcd", values, strict=True):
        tensors = {"lm_head.weight": torch.full((5, 4), float(value))}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    if sum(values) == 2:
        with pytest.raises(InputError, match=r"base weights .* the others are no majority"):
            aggregate(tmp_path / "round", tmp_path / "out", SKIP)
        return
    report = aggregate(tmp_path / "round", tmp_path / "out", SKIP)
    assert [one.name for one in report.left_out] == ["a"]


def test_a_rank_above_the_limit_is_the_clients_own_fault(clients: Path) -> None:
    shutil.rmtree(clients / "bad")
    make(clients, Spec("bad", rank=4, samples=5))

    assert left_out(clients, max_rank=3) == {"bad": "rank 4, above --max-rank 3"}


def test_what_was_named_and_is_not_there_is_left_out(clients: Path, tmp_path: Path) -> None:
    task = prepare([clients, tmp_path / "gone"], tmp_path / "out", SKIP)

    assert [one.name for one in task.clients.left_out] == ["gone"]


# Sample counts


def test_a_file_of_counts_may_know_clients_that_are_left_out(clients: Path) -> None:
    set_config(clients / "bad", r=-4)
    file = clients.parent / "counts.json"

    file.write_text('{"ann": 1, "bob": 2, "good": 3, "bad": 4}')
    assert set(left_out(clients, samples=file)) == {"bad"}
    file.write_text('{"ann": 1, "bob": 2, "good": 3, "zoe": 4}')
    with pytest.raises(InputError, match="a count for zoe, which is no client"):
        left_out(clients, samples=file)


def test_who_is_not_in_the_file_of_counts_is_left_out(clients: Path) -> None:
    file = clients.parent / "counts.csv"
    file.write_text("ann,1\nbob,2\ngood,3\n")

    assert left_out(clients, samples=file) == {"bad": f"no count for bad in {file.name}"}


def test_a_wrong_file_of_counts_is_nobodys_fault_but_the_operators(clients: Path) -> None:
    file = clients.parent / "counts.csv"
    file.write_text("ann,1\nbob,2\ngood,3\nbad,-4\n")

    with pytest.raises(InputError, match="bad: -4"):
        left_out(clients, samples=file)


def test_one_client_with_a_count_does_not_put_the_others_at_fault(clients: Path) -> None:
    for name in GOOD:
        (clients / name / "fedlora.json").unlink()

    assert left_out(clients) == {"bad": "a sample count, while most clients have none"}


@pytest.mark.parametrize(
    ("counts", "limit", "refused"),
    [
        ([10, 10, 1000], 100, []),
        ([10, 10, 1001], 100, ["c2"]),
        ([1, 101], 100, ["c1"]),  # the lower median of two is the smaller one
        ([1, 100], 100, []),
        ([0, 0, 0, 5, 400], 100, []),  # zero is no vote, and no median
        ([1, 1, 3000, 4000, 5000], 1, ["c3", "c4"]),
        ([10, 10, 1001], float("inf"), []),
    ],
)
def test_a_count_far_beyond_the_median_is_refused(
    tmp_path: Path, counts: list[float], limit: float, refused: list[str]
) -> None:
    for k, count in enumerate(counts):
        make(tmp_path / "round", Spec(f"c{k}", rank=2, samples=count))
    faults: list[InputError] = []

    read_clients([tmp_path / "round"], on_fault=faults.append, max_count_ratio=limit)

    assert [fault.path for fault in faults] == [tmp_path / "round" / name for name in refused]


def test_the_ways_out_of_a_count_beyond_the_median(clients: Path, tmp_path: Path) -> None:
    (clients / "bad/fedlora.json").write_text('{"samples": 5000}')
    (tmp_path / "counts.json").write_text('{"ann": 1, "bob": 2, "good": 3, "bad": 5000}')
    given = ("aggregate", clients, "-o", tmp_path / "out", "--dry-run")

    refused = run(*given)

    assert refused.exit_code == 3
    expected = "bad: 5000 self-reported samples, more than 100 times the median of the clients, 11"
    assert expected in refused.stderr
    assert "give --samples FILE, or a larger --max-count-ratio" in refused.stderr
    for way in (
        ("--samples", tmp_path / "counts.json"),
        ("--max-count-ratio", 500),
        ("--on-bad-client", "skip"),
    ):
        assert run(*given, *way).exit_code == 0
    for command in ("compare", "diagnose", "predict"):
        other = run(command, clients)
        assert other.exit_code == 0
        assert f"{expected}; aggregate refuses that" in other.stderr
    assert expected in run("inspect", clients).stderr


@pytest.mark.parametrize("counts", [(150, 1), (150, 150, 1e-6, 1e-6)])
def test_counts_that_would_put_half_of_the_clients_at_fault_end_the_round(
    tmp_path: Path, counts: tuple[float, ...]
) -> None:
    for k, count in enumerate(counts):
        make(tmp_path / "round", Spec(f"c{k}", rank=2, samples=count))

    with pytest.raises(
        InputError, match=r"c0: 150 self-reported samples, .* the others are no majority"
    ):
        prepare(tmp_path / "round", tmp_path / "out", SKIP)


def test_it_is_said_who_vouches_for_the_counts(clients: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text('{"ann": 1, "bob": 2, "good": 3, "bad": 4}')
    cases: dict[str, tuple[tuple[object, ...], str]] = {
        "operator": (("--samples", counts), "sample counts: from --samples"),
        "clients": ((), "sample counts: self-reported by the clients"),
        "uniform": ((), "sample counts: unknown, so all clients have equal weight"),
    }
    for kind, (options, words) in cases.items():
        if kind == "uniform":
            for folder in clients.iterdir():
                (folder / "fedlora.json").unlink()
        out = tmp_path / kind
        result = run("aggregate", clients, "-o", out, *options)

        assert json.loads((out / "fedlora.json").read_text())["samples_from"] == kind
        assert f"\n{words}\n" in result.stdout
        assert f"- {words}\n" in (out / "README.md").read_text()


# Copies


def copied(clients: Path) -> None:
    (clients / "bad/fedlora.json").write_text('{"samples": 10}')
    shutil.copyfile(clients / "ann" / WEIGHTS, clients / "bad" / WEIGHTS)


def test_copies_are_refused_left_out_or_counted_as_it_is_asked(
    clients: Path, tmp_path: Path
) -> None:
    copied(clients)

    with pytest.raises(InputError, match=r"bad/.*: the same weights as .*ann.* --allow-copies"):
        aggregate(clients, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    skipped = aggregate(clients, tmp_path / "skipped", SKIP)
    counted = aggregate(clients, tmp_path / "counted", AggregateOptions(allow_copies=True))

    assert [one.name for one in skipped.left_out] == ["bad"]
    assert len(counted.clients) == 4
    assert "bad has the same weights as ann; both are counted" in counted.warnings
    assert run("inspect", clients).exit_code == 0
    seen = run("inspect", clients, "--values")
    assert seen.exit_code == 3
    assert seen.stderr.count("the same weights as") == 1


@pytest.mark.parametrize("name", ["aaa", "zzz"])
@pytest.mark.parametrize("samples", [0, 5000])
def test_a_copy_with_another_count_displaces_nobody(
    clients: Path, name: str, samples: float
) -> None:
    """Whichever was there first cannot be told from the files."""
    shutil.rmtree(clients / "bad")
    shutil.copytree(clients / "ann", clients / name)
    (clients / name / "fedlora.json").write_text(json.dumps({"samples": samples}))
    options = AggregateOptions(on_bad_client="skip", max_count_ratio=1000)

    with pytest.raises(InputError, match=r"same weights as .* give both one count in --samples"):
        aggregate(clients, clients.parent / "out", options)

    file = clients.parent / "counts.json"
    file.write_text(json.dumps(dict.fromkeys((*GOOD, name), 10)))
    report = aggregate(
        clients, clients.parent / "out", AggregateOptions(on_bad_client="skip", samples=file)
    )
    assert [one.name for one in report.left_out] == [max(name, "ann")]


def test_a_copy_with_another_scaling_displaces_nobody(clients: Path) -> None:
    copied(clients)
    set_config(clients / "bad", lora_alpha=1e-9)

    with pytest.raises(
        InputError, match="its config gives them another meaning; remove one of them"
    ):
        aggregate(clients, clients.parent / "out", SKIP)


# Adapters in folders of the clients' own


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Clients as the Trainer leaves them: checkpoints, and a count beside them."""
    for number, name in enumerate(GOOD):
        home = tmp_path / "round" / name
        for step in (9, 10):
            make(home, Spec(f"checkpoint-{step}", rank=2, samples=None, seed=10 * number + step))
        (home / "all_results.json").write_text(json.dumps({"train_samples": 5 + number}))
    return tmp_path / "round"


def test_an_adapter_in_a_folder_of_each_client_is_named(nested: Path, tmp_path: Path) -> None:
    (nested / "bob/checkpoint-10/fedlora.json").write_text('{"samples": 70}')

    options = AggregateOptions(adapter="checkpoint-10")
    report = aggregate(nested, tmp_path / "out", options)
    apart = tmp_path / "apart"
    for row, name in zip(report.clients, GOOD, strict=True):
        shutil.copytree(nested / name / "checkpoint-10", apart / name)
        (apart / name / "fedlora.json").write_text(json.dumps({"samples": row.samples}))
    aggregate(apart, tmp_path / "same")

    assert [(row.name, row.samples) for row in report.clients] == [
        ("ann", 5),
        ("bob", 70),
        ("good", 7),
    ]
    assert_one_result(tmp_path / "out", tmp_path / "same")


def test_the_last_checkpoint_of_each_client_is_taken(nested: Path, tmp_path: Path) -> None:
    """9 before 10, and each has its own."""
    shutil.rmtree(nested / "ann/checkpoint-10")
    (nested / "good/checkpoint-10").rename(nested / "good/checkpoint-100")

    read = read_clients([nested], adapter="checkpoint-*")
    aggregate(nested, tmp_path / "out", AggregateOptions(adapter="checkpoint-*"))
    ends = {"ann": "checkpoint-9", "bob": "checkpoint-10", "good": "checkpoint-100"}
    for name, end in ends.items():
        shutil.copytree(nested / name / end, tmp_path / "apart" / name)
        shutil.copy(nested / name / "all_results.json", tmp_path / "apart" / name)
    aggregate(tmp_path / "apart", tmp_path / "same")

    assert {one.name: one.adapter.path.name for one in read.cohort.clients} == ends
    assert read.cohort.samples.tolist() == [5, 6, 7]
    assert_one_result(tmp_path / "out", tmp_path / "same")


def test_a_file_is_not_proposed_as_an_adapter_of_each_client(clients: Path) -> None:
    (clients / "model").mkdir()
    (clients / "model/model.safetensors").touch()

    with pytest.raises(
        InputError, match="model: no adapter in it, but files that may be adapters"
    ) as refusal:
        read_clients([clients])
    assert "--adapter" not in str(refusal.value)

    make(clients / "model", Spec("checkpoint-10", rank=2))
    with pytest.raises(InputError, match=r"subfolders: checkpoint-10; give --adapter 'checkp"):
        read_clients([clients])


def test_every_command_that_takes_clients_knows_it(nested: Path, tmp_path: Path) -> None:
    last = ("--adapter", "checkpoint-10")
    assert run("aggregate", nested, "-o", tmp_path / "out", *last).exit_code == 0
    for command in ("compare", "diagnose", "inspect"):
        result = run(command, nested, *last)
        assert result.exit_code == 0, result.output
        assert command == "compare" or "good " in result.stdout
    handed = run("distribute", tmp_path / "out", "-o", tmp_path / "s", "--like", nested, *last)
    assert handed.exit_code == 0
    assert sorted(place.name for place in (tmp_path / "s").iterdir()) == list(GOOD)
    alone = run("distribute", tmp_path / "out", "-o", tmp_path / "t", "--rank", 2, *last)
    assert alone.exit_code == 2
    assert "--adapter: given without --like" in alone.stderr


def test_checkpoints_beside_adapters_are_not_left_out_in_silence(
    nested: Path, tmp_path: Path
) -> None:
    place = make(nested, Spec("dee", rank=2)).folder
    make(place, Spec("checkpoint-10", rank=2))

    refused = run("aggregate", nested, "-o", tmp_path / "out")

    assert refused.exit_code == 3
    assert "ann: no adapter in it, but in its subfolders: checkpoint-9, chec" in refused.stderr
    assert "give --adapter 'checkpoint-*' if they belong to one client" in refused.stderr


def test_with_checkpoints_alone_the_last_one_is_proposed(nested: Path) -> None:
    with pytest.raises(
        InputError, match=r"ann has checkpoint-9, .*: give --adapter 'checkpoint-\*'"
    ):
        read_clients([nested])


def test_the_top_of_a_folder_counts_and_nothing_below_it(tmp_path: Path) -> None:
    home = make(tmp_path / "round", Spec("a", rank=2)).folder
    make(home, Spec("checkpoint-10", rank=2))

    assert read_clients([tmp_path / "round"]).cohort.names == ("a",)
    make(tmp_path / "round/b", Spec("mine", rank=2))
    with pytest.raises(
        InputError, match="no adapter named mine in it, but the folder itself is an adapter"
    ):
        read_clients([tmp_path / "round"], adapter="mine")


def test_who_has_another_adapter_than_the_one_named_is_at_fault(nested: Path) -> None:
    (nested / "good/checkpoint-10").rename(nested / "good/checkpoint-11")

    with pytest.raises(
        InputError, match="good: no adapter named checkpoint-10 in it, but in its subfolders"
    ):
        read_clients([nested], adapter="checkpoint-10")
    skip = AggregateOptions(adapter="checkpoint-10", on_bad_client="skip")
    task = prepare(nested, nested.parent / "out", skip)
    assert [one.name for one in task.clients.left_out] == ["good"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0b"])
def test_the_name_of_an_adapter_is_no_path(nested: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--adapter"):
        read_clients([nested], adapter=name)


def test_an_adapter_may_not_be_a_link_that_leads_out_of_the_folder(
    nested: Path, tmp_path: Path
) -> None:
    make(tmp_path, Spec("secret", rank=2))
    (nested / "good/mine").symlink_to(tmp_path / "secret")

    with pytest.raises(InputError, match="a link that leads out of the folder"):
        read_clients([nested / "good"], adapter="mine")


# Choices


@pytest.mark.parametrize(
    "options",
    [{"min_clients": 0}, {"max_count_ratio": 0.5}, {"max_count_ratio": float("nan")}],
)
def test_choices_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        AggregateOptions(**options)


def test_rounds_have_no_adapter_in_a_folder_of_their_own() -> None:
    with pytest.raises(UsageError, match="--adapter"):
        fedlora.DiagnoseOptions(subject="rounds", adapter="a")
