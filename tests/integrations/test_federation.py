"""A federation's server without any framework: rounds, the roster, resuming, bad uploads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.adapters import Spec, make, relative_error
from support.rounds import SHAPES

from fedlora_cli import (
    AggregateOptions,
    InputError,
    OutputError,
    StateDict,
    UsageError,
    aggregate,
    aggregate_state_dicts,
    diagnose,
)
from fedlora_cli.integrations.federation import DEFAULTS, Federation, Member

NAMES = {"ann": (2, 4.0), "bob": (4, 4.0), "cy": (6, 9.0)}
MODULE = "base_model.model.layers.0.q_proj"


def upload(place: Path, name: str, number: int) -> StateDict:
    """The upload of a client in a round; other weights in every round."""
    rank, alpha = NAMES[name]
    spec = Spec(name, rank, samples=rank * 10, alpha=alpha, shapes=SHAPES, seed=number)
    return StateDict.load(
        make(place / f"made-{number}-{torch.randint(10**9, ()).item()}", spec).folder
    )


def uploads(place: Path, number: int, *names: str) -> dict[str, StateDict]:
    return {name: upload(place, name, number) for name in names or NAMES}


def update(state: StateDict) -> torch.Tensor:
    B, A = (state.tensors[f"{MODULE}.lora_{side}.weight"].double() for side in "BA")
    return state.scaling * B @ A


def zero_start(place: Path, rank: int = 8) -> StateDict:
    state = StateDict.load(make(place, Spec("start", rank, None, alpha=16, shapes=SHAPES)).folder)
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in state.tensors.items()}
    return replace(state, tensors=tensors)


OPTIONS = replace(DEFAULTS, momentum=0.5, quorum=0.6)


@pytest.mark.parametrize("on_disk", [False, True])
def test_two_and_two_rounds_equal_four(tmp_path: Path, on_disk: bool) -> None:
    """The clients of round 3 lack the highest rank, which the previous adapter keeps."""
    names = [("ann", "bob", "cy"), ("ann", "bob", "cy"), ("ann", "bob"), ("ann", "cy")]
    rounds = [uploads(tmp_path, n, *names[n]) for n in range(4)]
    start = zero_start(tmp_path)

    def federation(folder: str) -> Federation:
        return Federation(OPTIONS, tmp_path / folder if on_disk else None).start(start)

    whole = federation("whole")
    for clients in rounds:
        whole, report, reason = whole.next(clients)
        assert report is not None, reason
    if not on_disk:
        assert whole.current is not None
        assert whole.current.rank == start.rank
        return
    half = federation("half")
    for clients in rounds[:2]:
        half, _, _ = half.next(clients)
    later = federation("half").resumed()
    assert (later.round, dict(later.roster)) == (2, dict(half.roster))
    for clients in rounds[2:]:
        later, _, _ = later.next(clients)
    for number in range(1, 5):
        for file in ("adapter_model.safetensors", "adapter_config.json", "fedlora.json"):
            one, other = (
                tmp_path / f / f"round-{number:02d}/global" / file for f in ("whole", "half")
            )
            assert one.read_bytes() == other.read_bytes()
    assert not [*(tmp_path / "whole").glob("*/clients")]
    assert diagnose(tmp_path / "whole").verdict is not None


def test_memory_and_folders_give_the_same_update(tmp_path: Path) -> None:
    start = zero_start(tmp_path)
    memory = Federation(OPTIONS).start(start)
    disk = Federation(OPTIONS, tmp_path / "rounds").start(start)
    for number in range(3):
        clients = uploads(tmp_path, number)
        memory, _, _ = memory.next(clients)
        disk, _, _ = disk.next(clients)
        assert memory.current is not None
        assert disk.current is not None
        for name, tensor in memory.current.tensors.items():
            assert torch.equal(tensor, disk.current.tensors[name]), name


def test_folders_are_those_of_the_command(tmp_path: Path) -> None:
    federation = Federation(OPTIONS, tmp_path / "rounds", keep_clients=True)
    for number in range(3):
        federation, _, _ = federation.next(uploads(tmp_path, number))
    for number in (1, 2, 3):
        folder = tmp_path / "rounds" / f"round-{number:02d}"
        options = replace(OPTIONS, rounds=tmp_path / "rounds", force=True, base="tiny/base")
        if number == 1:
            options = replace(options, momentum=0.0)
        before = (folder / "global/adapter_model.safetensors").read_bytes()
        aggregate(folder / "clients", folder / "global", options)
        assert (folder / "global/adapter_model.safetensors").read_bytes() == before


def test_every_client_gets_its_own_rank_and_scaling(tmp_path: Path) -> None:
    federation, _, _ = Federation().next(uploads(tmp_path, 0))
    assert federation.roster["cy"] == Member(6, 1.5, 1)
    for name, (rank, alpha) in NAMES.items():
        state = federation.for_client(name)
        assert state is not None
        assert (state.rank, state.scaling) == (rank, alpha / rank)
    assert federation.for_client("stranger") is federation.current
    known = federation.with_member("dan", 3, 0.5).for_client("dan")
    assert known is not None
    assert (known.rank, known.scaling) == (3, 0.5)
    assert federation.for_client("ann") is federation.for_client("ann")


def test_without_an_adapter_there_is_nothing_to_send() -> None:
    assert Federation().with_member("ann", 3, 0.5).for_client("ann") is None


def test_an_initial_adapter_that_is_not_zero_is_the_previous_one(tmp_path: Path) -> None:
    """With a quorum of 1, the previous adapter keeps the share of the absent clients."""
    start = StateDict.load(make(tmp_path, Spec("start", 6, None, alpha=6, shapes=SHAPES)).folder)
    options = replace(DEFAULTS, quorum=1.0)
    clients = uploads(tmp_path, 0, "ann")
    results = []
    for rounds in (None, tmp_path / "rounds"):
        federation, _, _ = Federation(options, rounds).start(start).next(clients)
        assert federation.current is not None
        results.append(update(federation.current))
    options = replace(options, rank=6)
    expected, _ = aggregate_state_dicts(clients, options, previous=start)
    without, _ = aggregate_state_dicts(clients, options)
    for result in results:
        assert relative_error(result.numpy(), update(expected).numpy()) < 1e-6
        assert relative_error(result.numpy(), update(without).numpy()) > 0.1
    again = Federation(options, tmp_path / "rounds").start(start).resumed()
    assert again.round == 1


def test_a_bad_upload_is_left_out_and_named(tmp_path: Path) -> None:
    clients = uploads(tmp_path, 0)
    clients["bob"] = replace(clients["bob"], tensors={"x": torch.full((2,), torch.nan)})
    clients["a/b"] = clients["ann"]
    for rounds in (None, tmp_path / "rounds"):
        federation, report, reason = Federation(rounds=rounds).next(clients)
        assert (federation.round, reason) == (1, "")
        assert report is not None
        assert [client.name for client in report.clients] == ["ann", "cy"]
        assert {client.name for client in report.left_out} == {"bob", "a/b"}
        assert set(federation.roster) == {"ann", "cy"}


def test_the_last_adapter_stays_if_all_uploads_are_bad_or_too_few(tmp_path: Path) -> None:
    bad = replace(upload(tmp_path, "bob", 1), config={"r": "x"})
    for rounds in (None, tmp_path / "rounds"):
        federation = Federation(replace(DEFAULTS, min_clients=2), rounds)
        federation, _, _ = federation.next(uploads(tmp_path, 0))
        for clients in ({"bob": bad, "cy": bad}, uploads(tmp_path, 1, "ann"), {"a/b": bad}, {}):
            after, report, reason = federation.next(clients)
            assert after is federation
            assert report is None
            assert reason
        federation, report, _ = federation.next(uploads(tmp_path, 2))
        assert federation.round == 2


def test_clients_that_did_not_train_count(tmp_path: Path) -> None:
    same = upload(tmp_path, "ann", 0)
    _, report, reason = Federation().next({"ann": same, "bob": same})
    assert report is not None, reason
    assert len(report.clients) == 2


def test_spooled_uploads_need_no_memory_and_a_second_one_replaces_the_first(tmp_path: Path) -> None:
    clients = uploads(tmp_path, 0)
    federation = Federation(rounds=tmp_path / "rounds", keep_clients=True)
    federation.spool("ann", clients["bob"])
    for name, state in clients.items():
        federation.spool(name, state)
    federation, report, _ = federation.next({})
    assert report is not None
    assert [client.rank for client in report.clients] == [2, 4, 6]
    with pytest.raises(UsageError, match="rounds: not given; uploads need a folder of rounds"):
        Federation().spool("ann", clients["ann"])


def test_what_a_killed_server_left_is_not_counted(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"
    federation, _, _ = Federation(rounds=rounds).next(uploads(tmp_path, 0))
    federation.spool("ann", upload(tmp_path, "ann", 5))
    resumed = Federation(rounds=rounds).resumed()
    assert not (rounds / "round-02/clients").exists()
    _, report, _ = resumed.next(uploads(tmp_path, 1, "bob", "cy"))
    assert report is not None
    assert [client.name for client in report.clients] == ["bob", "cy"]


def test_folders_of_others_are_not_resumed_and_their_files_stay(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"
    assert Federation(rounds=rounds).resumed().round == 0
    Federation(rounds=rounds).next(uploads(tmp_path, 0))
    (rounds / "round-02/clients").mkdir(parents=True)
    (rounds / "round-02/clients/thesis.tex").touch()
    Federation(rounds=rounds).resumed()
    assert (rounds / "round-02/clients/thesis.tex").exists()
    (rounds / "round-01").rename(rounds / "round-07")
    with pytest.raises(InputError, match=r"its rounds are round-07; name another folder"):
        Federation(rounds=rounds).resumed()


def test_a_changed_adapter_or_a_damaged_roster_is_told(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"
    Federation(rounds=rounds).next(uploads(tmp_path, 0))
    roster = rounds / "round-01/roster.json"
    good = json.loads(roster.read_text())
    faults: list[dict[str, object]] = [
        {"ann": 4},
        {"ann": {"rank": -1, "scaling": 1.0, "round": 1}},
        {"ann": {}},
    ]
    for bad in faults:
        roster.write_text(json.dumps(bad))
        with pytest.raises(InputError, match=r"roster\.json: ann is .*; remove the file"):
            Federation(rounds=rounds).resumed()
    roster.write_text(json.dumps(good))
    assert Federation(rounds=rounds).resumed().roster["ann"] == Member(2, 2.0, 1)
    roster.unlink()
    assert Federation(rounds=rounds).resumed().roster == {}
    with (rounds / "round-01/global/adapter_config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="changed since fedlora wrote it"):
        Federation(rounds=rounds).resumed()


def test_options_that_the_federation_knows_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="previous: given in the options of a federation"):
        Federation(AggregateOptions(previous=tmp_path))


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "rounds").touch()
    with pytest.raises(OutputError, match=r"clients: cannot be written"):
        Federation(rounds=tmp_path / "rounds").next(uploads(tmp_path, 0))


def test_an_upload_that_no_file_can_hold_loses_its_client_alone(tmp_path: Path) -> None:
    clients = uploads(tmp_path, 0)
    many = dict.fromkeys(map(str, range(150_001)), torch.ones(1))
    clients["bob"] = replace(clients["bob"], tensors=many)
    for rounds in (None, tmp_path / "rounds"):
        _, report, reason = Federation(rounds=rounds).next(clients)
        assert report is not None, reason
        assert [(c.name, "150001 tensors" in c.reason) for c in report.left_out] == [("bob", True)]


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("rounds", "no space left on device", "free some space")

    monkeypatch.setattr("fedlora_cli.integrations.federation.aggregate", full)
    with pytest.raises(OutputError, match="no space left"):
        Federation(rounds=tmp_path / "rounds").next(uploads(tmp_path, 0))


#: Uploads and their size, and the peak of the server beyond it, in MB.
_MEMORY = """
import sys
from pathlib import Path
import torch
from fedlora_cli import StateDict, aggregate_state_dicts
from fedlora_cli.integrations.federation import Federation


def upload(number):
    rank, tensors = (8, 16)[number % 2], {}
    for layer in range(12):
        for module in ("query", "value"):
            prefix = f"base_model.model.vit.encoder.layer.{layer}.attention.attention.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 768)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(768, rank)
    targets = ["query", "value"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": targets}
    return StateDict(tensors, config, 10)


def held(field):
    # Not getrusage: its peak is at least that of the process that started this one.
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


Federation().next({"ann": upload(0), "bob": upload(1)})  # imports what it needs
before = held("VmRSS")
if sys.argv[1] == "memory":
    uploads = {f"client-{k}": upload(k) for k in range(200)}
    before = held("VmRSS")
    _, report, reason = Federation().next(uploads)
else:
    federation = Federation(rounds=Path(sys.argv[2]))
    for k in range(200):
        federation.spool(f"client-{k}", upload(k))
    _, report, reason = federation.next({})
assert len(report.clients) == 200, reason
print(held("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["memory", "spooled"])
def test_two_hundred_uploads_are_not_copied(tmp_path: Path, mode: str) -> None:
    """They hold 340 MB. A thousand took 207 MB more than they held."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, mode, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 250


@pytest.mark.parametrize("method", ["flora", "flexlora", "raflora"])
def test_a_client_gets_the_best_of_its_rank(tmp_path: Path, method: str) -> None:
    """flora puts the factors of all clients one after another; the others truncate."""
    options = replace(DEFAULTS, method=method)
    after, _, _ = Federation(options).next(uploads(tmp_path, 1))
    cut = after.with_member("new", 3, 2.5).for_client("new")

    U, s, Vh = torch.linalg.svd(update(after.current))
    best = (U[:, :3] * s[:3]) @ Vh[:3]
    assert (cut.rank, cut.scaling) == (3, 2.5)
    assert relative_error(update(cut), best) < 1e-6


def test_a_client_starts_from_the_first_rows_of_the_initial_adapter(tmp_path: Path) -> None:
    start = zero_start(tmp_path)
    federation = Federation(replace(DEFAULTS, method="flora")).start(start)
    cut = federation.with_member("new", 3, 2.0).for_client("new")

    A = f"{MODULE}.lora_A.weight"
    rows = start.tensors[A][:3].double()
    assert relative_error(cut.tensors[A].double(), rows) < 1e-6
