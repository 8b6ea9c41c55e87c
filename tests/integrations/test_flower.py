"""Flower in one process, with the real Strategy, Message and ClientApp."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from support.adapters import relative_error
from support.flower import (
    RANKS,
    Calls,
    Clients,
    base,
    classifier,
    of_ranks,
    peft_model,
    run,
    strategy,
    train_a_little,
)

from fedlora_cli import StateDict, aggregate_state_dicts
from fedlora_cli.integrations.federation import DEFAULTS
from fedlora_cli.integrations.flower import to_record, to_tensors


def assert_equal(one: StateDict, other: StateDict) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name]), name


def updates(state: StateDict) -> dict[str, torch.Tensor]:
    """The updates of an adapter of one rank, in float64."""
    A = {k: v.double() for k, v in state.tensors.items() if "lora_A" in k}
    return {k: state.scaling * state.tensors[k.replace("_A", "_B")].double() @ A[k] for k in A}


def best(update: torch.Tensor, rank: int) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(update)
    return (U[:, : len(s)] * s)[:, :rank] @ Vh[:rank]


def rank_in(arrays: ArrayRecord) -> int:
    [rank] = {array.shape[0] for name, array in arrays.items() if "lora_A" in name}
    return rank


def test_every_client_gets_the_global_adapter_at_its_rank_and_scaling() -> None:
    clients = of_ranks()
    clients.models["cy"] = lambda: peft_model(6, alpha=5)  # another scaling than the others
    grid = Calls(clients.app(), clients.models)
    made, arrays = strategy(ask_nodes=True)
    made.start(grid, arrays, num_rounds=1)
    first = updates(made.federation.current)
    made.start(grid, arrays, num_rounds=1)

    for name, rank in RANKS.items():
        assert [len(grid.of_type(kind, name)) for kind in ("query", "train")] == [1, 2]
        sent = [message.content["arrays"] for message in grid.of_type("train", name)]
        assert [rank_in(arrays) for arrays in sent] == [rank, rank], "no client has to cut"
        card = grid.of_type("train", name)[-1].content["lora"]
        assert (card["rank"], card["scaling"]) == (rank, 5 / 6 if name == "cy" else 2.0)
        for key, update in updates(clients.received[name]).items():
            assert relative_error(update, best(first[key], rank)) < 1e-6


def test_an_unknown_client_gets_the_whole_adapter_and_cuts_it() -> None:
    clients, ranks = of_ranks(), []
    grid = Calls(clients.app(), clients.models)
    made, arrays = strategy()
    for number in range(2):
        made.start(grid, arrays, num_rounds=1)
        current = updates(made.federation.current)
        if number == 0:
            # A restart of a node without authentication: its number is new.
            grid.names = {node + 50: name for node, name in grid.names.items()}
    ranks = [rank_in(one.content["arrays"]) for one in grid.messages]

    assert ranks == [8, 8, 8, 8, 8, 8]
    made.start(grid, arrays, num_rounds=1)
    assert rank_in(grid.of_type("train", "ann")[-1].content["arrays"]) == 4
    for key, update in updates(clients.received["cy"]).items():
        assert relative_error(update, best(current[key], 6)) < 1e-6


def test_of_concatenated_factors_a_client_gets_the_best_approximation() -> None:
    clients = of_ranks()
    grid = Calls(clients.app(), RANKS)
    made, arrays = strategy(method="flora", ask_nodes=True)
    made.start(grid, arrays, num_rounds=1)
    first = updates(made.federation.current)
    grid.names = {node + 50: name for node, name in grid.names.items()}
    made.ask_nodes = False  # so the client itself cuts
    made.start(grid, arrays, num_rounds=1)

    assert rank_in(grid.of_type("train", "ann")[-1].content["arrays"]) == sum(RANKS.values())
    for key, update in updates(clients.received["ann"]).items():
        assert relative_error(update, best(first[key], 4)) < 1e-6
    cut = updates(made.federation.for_client("ann"))
    for key, update in updates(made.federation.current).items():
        assert relative_error(cut[key], best(update, 4)) < 1e-6


def test_a_client_of_a_higher_rank_than_the_global_one_fills_the_rest() -> None:
    clients = of_ranks(RANKS | {"bob": 12})
    made = run(clients, 2, ask_nodes=True)

    for key, update in updates(clients.received["bob"]).items():
        # The output keeps rank 8; what the client got is of that rank, in factors of rank 12.
        assert torch.linalg.matrix_rank(update, rtol=1e-5) == 8
        assert clients.received["bob"].tensors[key].shape[0] == 12
    assert made.federation.roster["bob"].rank == 12


def test_a_rank_that_no_adapter_here_can_have_ends_no_run(lines: list[str]) -> None:
    def change(name: str, content: RecordDict) -> None:
        """Rank 40, in modules with at most 16 directions."""
        if name == "bob":
            tensors = to_tensors(content["arrays"])
            padded = {
                k: torch.cat([v, v.new_zeros(32, v.shape[1])])
                if "lora_A" in k
                else torch.cat([v, v.new_zeros(v.shape[0], 32)], dim=1)
                for k, v in tensors.items()
            }
            content["arrays"] = to_record(padded)
            config(content, r=40, lora_alpha=80)

    grid = Calls(of_ranks(change=change).app(), RANKS)
    made, arrays = strategy()
    made.start(grid, arrays, num_rounds=2)

    assert (made.round, made.federation.roster["bob"].rank) == (2, 40)
    assert rank_in(grid.of_type("train", "bob")[1].content["arrays"]) == 8
    assert any(line.startswith("bob gets the whole adapter: rank: 40, ") for line in lines)


def test_a_round_is_that_of_state_dicts() -> None:
    clients = of_ranks(samples={"ann": 30, "bob": 5, "cy": 11})
    options = replace(DEFAULTS, max_weight=0.4)
    made, arrays = strategy(options=options, method="rbla")
    made.start(Calls(clients.app(), RANKS), arrays, num_rounds=1)
    first, before = made.federation.current, dict(clients.sent)
    made.start(Calls(clients.app(), RANKS), arrays, num_rounds=1)

    options = replace(options, rank=8, method="rbla")
    initial = StateDict(to_tensors(arrays), made.lora_config)
    expected, _ = aggregate_state_dicts(before, options, previous=initial)
    assert_equal(first, expected)
    expected, report = aggregate_state_dicts(clients.sent, options, previous=first)
    assert_equal(made.federation.current, expected)
    assert made.report.clients == report.clients
    assert (made.report.method, made.round) == ("rbla", 2)


@pytest.mark.parametrize("on_disk", [False, True])
def test_paths_of_base_models_stay_on_their_machines(on_disk: bool, tmp_path: Path) -> None:
    def model(rank: int, name: str) -> Any:
        place = tmp_path / name / "llama"
        base().config.save_pretrained(place)  # PEFT looks into it
        made = peft_model(rank)
        made.peft_config["default"].base_model_name_or_path = str(place)
        return made

    cards = []
    clients = Clients(
        {name: lambda n=name, r=rank: model(r, n) for name, rank in RANKS.items()},
        change=lambda name, content: cards.append(content["lora"]["config"]),
    )
    rounds = tmp_path / "rounds" if on_disk else None
    made = run(clients, 2, model(8, "server"), rounds=rounds)

    assert made.round == 2
    current = made.federation.current.config
    assert current["base_model_name_or_path"] == str(tmp_path / "server/llama")
    assert len(cards) == 6
    assert not any(str(tmp_path) in text for text in cards)


def test_the_server_can_set_the_ranks() -> None:
    clients = of_ranks(dict.fromkeys(RANKS, 8))
    grid = Calls(clients.app(), RANKS)
    made, arrays = strategy(ranks={"ann": 2, "bob": 3}, rounds=None)
    made.start(grid, arrays, num_rounds=1)

    ranks = {name: rank_in(grid.of_type("train", name)[0].content["arrays"]) for name in RANKS}
    assert ranks == {"ann": 2, "bob": 3, "cy": 8}


def test_nodes_evaluate_at_their_ranks() -> None:
    grid = Calls(of_ranks().app(), RANKS)
    made, arrays = strategy(fraction_evaluate=1.0, min_evaluate_nodes=3)
    result = made.start(grid, arrays, num_rounds=2)

    for name, rank in RANKS.items():
        sent = grid.of_type("evaluate", name)
        assert [rank_in(message.content["arrays"]) for message in sent] == [rank, rank]
        assert [message.content["config"]["server-round"] for message in sent] == [1, 2]
    # The mean of 4, 8 and 6.
    assert result.evaluate_metrics_clientapp[2]["rank"] == pytest.approx(6)
    assert result.train_metrics_clientapp[2] == {"train_loss": 1.0}


def test_bfloat16_and_heads_travel_bit_by_bit() -> None:
    models = {name: lambda rank=rank: classifier(rank) for name, rank in RANKS.items()}
    clients = Clients(models, samples={"ann": 1, "bob": 2, "cy": 3})
    grid = Calls(clients.app(), RANKS)
    made, arrays = strategy(classifier(8))
    result = made.start(grid, arrays, num_rounds=2)

    head = next(name for name in clients.sent["ann"].tensors if "score" in name)
    assert clients.sent["ann"].tensors[head].dtype == torch.bfloat16
    assert arrays[head].dtype == result.arrays[head].dtype == "bfloat16"
    # The mean by samples, rounded once.
    weights = {"ann": 1 / 6, "bob": 2 / 6, "cy": 3 / 6}
    mean = sum(w * clients.sent[name].tensors[head].double() for name, w in weights.items())
    assert torch.equal(to_tensors(result.arrays)[head], mean.to(torch.bfloat16))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64],
)
def test_a_record_holds_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    given = {"a": tensor, "b": tensor.T, "c": tensor[1, 2], "d": tensor[:, ::2], "e": tensor[:0]}
    back = to_tensors(to_record(given))

    for name, value in given.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].double(), value.double())
    back["a"].zero_()  # a copy, which can be trained
    assert tensor[2, 3].double() == 5


def test_a_lost_node_and_a_failed_client_do_not_end_the_round(lines: list[str]) -> None:
    def train(model: Any, name: str, number: int) -> None:
        if name == "ann" and number == 2:
            raise MemoryError("no memory left")
        train_a_little(model, name, number)

    clients = of_ranks(RANKS | {"dan": 2}, train=train)
    grid = Calls(clients.app(), clients.models, lost=[104])
    made, arrays = strategy(min_train_nodes=4)
    made.start(grid, arrays, num_rounds=2)

    assert [row.name for row in made.report.clients] == ["bob", "cy"]
    assert "aggregate_train: 2 replies and 2 failures" in lines
    assert sum("the node is not there" in line for line in lines) == 2
    assert sum("no memory left" in line for line in lines) == 1
    assert made.report.rank == 8


def test_idle_clients_may_return_what_they_got() -> None:
    clients = of_ranks(dict.fromkeys(RANKS, 8), train=lambda *_: None)
    made = run(clients, 2)

    assert made.round == 2
    assert [row.name for row in made.report.clients] == ["ann", "bob", "cy"]
    assert made.report.norm == 0


def spoil_values(content: RecordDict) -> None:
    tensors = to_tensors(content["arrays"])
    next(iter(tensors.values()))[0, 0] = float("nan")
    content["arrays"] = to_record(tensors)


def other_shape(content: RecordDict) -> None:
    tensors = to_tensors(content["arrays"])
    name = next(name for name in tensors if "lora_B" in name)
    content["arrays"] = to_record(tensors | {name: tensors[name][:-1]})


def array(content: RecordDict, **changed: Any) -> None:
    name, old = next(iter(content["arrays"].items()))
    fields = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
    content["arrays"] = ArrayRecord(dict(content["arrays"]) | {name: Array(**fields | changed)})


def card(content: RecordDict, **changed: Any) -> None:
    content["lora"] = ConfigRecord(dict(content["lora"]) | changed)


def config(content: RecordDict, **changed: Any) -> None:
    card(content, config=json.dumps(json.loads(content["lora"]["config"]) | changed))


def cast(content: RecordDict, dtype: Any) -> None:
    name, old = next(iter(content["arrays"].items()))
    content["arrays"] = ArrayRecord(
        dict(content["arrays"]) | {name: Array(old.numpy().astype(dtype))}
    )


def metric(content: RecordDict, name: str, value: Any) -> None:
    content["metrics"] = MetricRecord(dict(content["metrics"]) | {name: value})


HUGE = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': "

BAD: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "not finite": (spoil_values, "cy: .*lora_A.* holds 1 NaN"),
    "other shape": (other_shape, "cy: .*linear 15 x 16, but linear 16 x 16 in ann"),
    "no numbers": (lambda c: array(c, data=b"\x80\x04junk"), "client cy: .*no array"),
    "a pickle": (lambda c: array(c, data=pickled()), "client cy: .*its dtype is object"),
    "a huge array": (
        lambda c: array(c, data=(HUGE + b"(99999999999, 9), }").ljust(128) + b"\x00" * 8),
        r"client cy: .*136 bytes for float32 of shape \(99999999999, 9\)",
    ),
    "another format": (lambda c: array(c, stype="torch.Tensor"), "client cy: .*as torch.Tensor"),
    "another dtype": (lambda c: array(c, dtype="bfloat16"), "client cy: .*float32 as bfloat16"),
    "no arrays": (lambda c: c.pop("arrays"), "client cy: 0 array records"),
    "two records": (lambda c: c.update(more=c["arrays"]), "client cy: 2 array records"),
    "no JSON": (lambda c: card(c, config="{"), "client cy: not valid JSON"),
    "a rank of text": (
        lambda c: card(c, config='{"peft_type": "LORA", "r": "4"}'),
        "cy: .*r is '4'",
    ),
    "no rank": (lambda c: config(c, r=None), "cy: .*: r is None"),
    "rank 0": (lambda c: config(c, r=0), "cy: .*r is 0"),
    "a negative rank": (lambda c: config(c, r=-4, use_rslora=True), "cy: .*r is -4"),
    "a huge rank": (lambda c: config(c, r=10**30), "cy: .*r is 1"),
    "a list of ranks": (lambda c: config(c, rank_pattern=[4]), "cy: .*rank_pattern is"),
    "ranks of text": (
        lambda c: config(c, rank_pattern={"q_proj": "4"}),
        r"cy: .*rank_pattern\['q_proj'\] is '4'",
    ),
    "an alpha of text": (lambda c: config(c, lora_alpha="x"), "cy: .*lora_alpha is 'x'"),
    "an infinite alpha": (lambda c: config(c, lora_alpha=1e999), "client cy: .*not valid JSON"),
    "other numbers": (lambda c: cast(c, np.uint16), "cy: .*lora_A.* has torch.uint16"),
    "truth values": (lambda c: cast(c, np.bool_), "cy: .*lora_A.* has torch.bool"),
    "complex numbers": (lambda c: cast(c, np.complex64), "client cy: .*its dtype is complex64"),
    "a long name": (lambda c: card(c, name="x" * 61), "node 103: a client named 'xxx"),
    "a key twice": (lambda c: card(c, config='{"r": 1, "r": 2}'), "client cy: .*appears twice"),
    "a huge config": (lambda c: card(c, config=" " * 2**20 + "{}"), "client cy: .*1048578 bytes"),
    "no config": (lambda c: card(c, config=5), "client cy: no LoRA config"),
    "no card": (lambda c: c.pop("lora"), "node 103: a reply without a card"),
    "a path as a name": (lambda c: card(c, name="../bob"), r"node 103: a client named '../bob'"),
    "a number as a name": (lambda c: card(c, name=3), "node 103: a client named '3'"),
    "another's name": (lambda c: card(c, name="BOB"), "node 103: node 102 has the name BOB"),
    "no count": (lambda c: c.update(metrics=MetricRecord({"x": 1})), "client cy: no number num-ex"),
    "a negative count": (lambda c: metric(c, "num-examples", -1), "cy: .*-1 samples"),
    "no finite count": (lambda c: metric(c, "num-examples", float("nan")), "cy: .*nan samples"),
    "a list of counts": (
        lambda c: metric(c, "num-examples", [1, 2]),
        "client cy: no number num-ex",
    ),
}


def pickled() -> bytes:
    """The bytes of an array of objects, which numpy pickles."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good() -> StateDict:
    """The global adapter of two clients."""
    made = run(of_ranks({"ann": 4, "bob": 8}), min_train_nodes=2, min_available_nodes=2)
    assert made.federation.current is not None
    return made.federation.current


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_client_is_skipped_and_named(
    fault: str, good: StateDict, lines: list[str], tmp_path: Path
) -> None:
    spoil, line = BAD[fault]
    clients = of_ranks(change=lambda name, content: name == "cy" and spoil(content))
    made = run(clients, 1, rounds=tmp_path / "rounds")

    assert [row.name for row in made.report.clients] == ["ann", "bob"]
    assert_equal(made.federation.current, good)
    [found] = [one for one in lines if one.startswith("left out")]
    assert re.search(line, found)
    assert "\n" not in found


def test_metrics_of_another_kind_are_left_out_of_the_mean(lines: list[str]) -> None:
    def change(name: str, content: RecordDict) -> None:
        if name == "cy":
            metric(content, "train_loss", [1.0, 2.0])

    made, arrays = strategy()
    result = made.start(Calls(of_ranks(change=change).app(), RANKS), arrays, num_rounds=1)

    assert [row.name for row in made.report.clients] == ["ann", "bob", "cy"]
    assert result.train_metrics_clientapp[1] == {"train_loss": 1.0}
    assert "left out of the mean metrics: cy has other metrics than most" in lines


def test_when_all_are_bad_the_last_adapter_stays(lines: list[str]) -> None:
    def change(name: str, content: RecordDict) -> None:
        if made.round == 1:
            spoil_values(content)

    clients = of_ranks(change=change)
    grid = Calls(clients.app(), RANKS)
    made, arrays = strategy()
    made.start(grid, arrays, num_rounds=1)
    first = made.federation.current
    result = made.start(grid, arrays, num_rounds=3)

    assert made.round == 1
    assert made.federation.current is first
    assert_equal(StateDict(to_tensors(result.arrays), first.config), first)
    assert sum(line.startswith("the last global adapter stays: ") for line in lines) == 3
    assert grid.messages[-1].content["config"]["server-round"] == 2


def test_with_too_few_replies_the_last_adapter_stays(lines: list[str]) -> None:
    grid = Calls(of_ranks().app(), RANKS, lost=[103])
    made, arrays = strategy(min_completed=3)
    made.start(grid, arrays, num_rounds=1)

    assert (made.round, made.report) == (0, None)
    assert any("stays: " in line and "2 " in line for line in lines)
    grid.lost.clear()
    made.start(grid, arrays, num_rounds=1)
    assert made.round == 1
