"""The parts of NVFlare's server and sites, in one process, with the real NVFlare."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from support.models import bert, llama
from torch import Tensor

from fedlora_cli import (
    AggregateOptions,
    DistributeOptions,
    InputError,
    StateDict,
    UsageError,
    aggregate,
    distribute,
)

pytest.importorskip("nvflare")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from safetensors.torch import load_file, save_file

from fedlora_cli.integrations.nvflare import (
    FedLoRAAggregator,
    FedLoRAPersistor,
    FedLoRARankFilter,
    load_adapter,
    lora_meta,
)

SITES = {"site-1": (4, 300), "site-2": (8, 200), "site-3": (16, 100)}
FILES = ("adapter_model.safetensors", "adapter_config.json")
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def peft_model(rank: int, alpha: float, seed: int = 0, build: Any = llama, **config: Any) -> Any:
    """A tiny model with an adapter that is not zero. All have the same base."""
    torch.manual_seed(0)
    base = build()
    if build is llama:
        config = {"target_modules": ["q_proj", "down_proj"], **config}
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, **config))
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_states(alpha: Callable[[int], float]) -> dict[str, StateDict]:
    return {
        site: StateDict.of(peft_model(rank, alpha(rank), rank), samples)
        for site, (rank, samples) in SITES.items()
    }


@pytest.fixture(scope="module")
def states() -> dict[str, StateDict]:
    """The results of three sites, of other ranks and scalings."""
    return make_states(lambda rank: 16)


def result_of(site: str, state: StateDict, tensors: Any = None, **meta: Any) -> FLModel:
    """A site's result as FedAvg gives it to the aggregator."""
    return FLModel(
        ParamsType.FULL,
        params=dict(state.tensors) if tensors is None else tensors,
        meta={
            "client_name": site,
            "num_examples": state.samples,
            "lora": dict(state.config),
            **meta,
        },
    )


def on_disk(state: StateDict, folder: Path) -> dict[str, Any]:
    """The tensors as references, as with `enable_tensor_disk_offload`."""
    folder.mkdir()
    files = {}
    for number, (name, tensor) in enumerate(state.tensors.items()):
        path = folder / f"{number}.safetensors"
        save_file({name: tensor.contiguous()}, path)
        files[name] = (str(path), name)
    lazy = LazyTensorDict(files, str(folder))
    return {name: lazy.make_lazy_ref(name) for name in lazy}


def server() -> FLContextManager:
    """A server of NVFlare that records the reasons of fatal errors."""
    fatal: list[str] = []

    def fire_event(kind: str, ctx: FLContext) -> None:
        if kind == EventType.FATAL_SYSTEM_ERROR:
            fatal.append(ctx.get_prop("__event_data__"))

    engine = SimpleNamespace(fire_event=fire_event, fatal=fatal)
    return FLContextManager(engine, identity_name="server", job_id="job")


def context(manager: FLContextManager | None = None, site: str | None = None) -> FLContext:
    """A context of the server; a task for `site` if there is one."""
    ctx = (manager or server()).new_context()
    if site is not None:
        peer = FLContextManager(identity_name=site, job_id="job").new_context()
        ctx.set_peer_context(peer)
    return ctx


def sent_to(site: str, manager: FLContextManager, rank_filter: FedLoRARankFilter,
            model: dict[str, Tensor]) -> FLModel:  # fmt: skip
    """The global adapter as NVFlare sends it to a site, with contiguous tensors only."""
    shareable = FLModelUtils.to_shareable(FLModel(ParamsType.FULL, params=model))
    filtered = rank_filter.process(shareable, context(manager, site))
    sent = FLModelUtils.from_shareable(filtered)
    assert all(tensor.is_contiguous() for tensor in sent.params.values())
    return sent


def saved(states: dict[str, StateDict], folder: Path) -> Path:
    folder.mkdir()
    for site, state in states.items():
        state.save(folder / site)
    return folder


def assert_same(tensors: dict[str, Tensor], folder: Path) -> None:
    """The tensors are those of the file, to the last bit."""
    expected = load_file(folder / FILES[0])
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The messages of warnings so far."""
    return lambda: [
        record.message for record in caplog.records if record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("method", ["raflora", "flexlora", "fedavg"])
def test_the_bytes_are_those_of_folders_in_any_order_of_arrival(
    tmp_path: Path, states: dict[str, StateDict], method: str, where: str
) -> None:
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global",
              AggregateOptions(method=method))  # fmt: skip
    for number, order in enumerate((list(states), list(reversed(states)))):
        aggregator = FedLoRAAggregator(method=method)
        for site in order:
            state = states[site]
            lazy = on_disk(state, tmp_path / f"{number}-{site}") if where == "disk" else None
            aggregator.accept_model(result_of(site, state, lazy))
        model = aggregator.aggregate_model()

        assert model.params_type == ParamsType.FULL
        assert_same(model.params, tmp_path / "global")


def test_heads_and_bfloat16_pass(tmp_path: Path) -> None:
    states = {}
    for site, (rank, samples) in SITES.items():
        model = peft_model(rank, 2 * rank, rank, bert, target_modules=["query"],
                           task_type="SEQ_CLS").to(torch.bfloat16)  # fmt: skip
        states[site] = StateDict.of(model, samples)
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global")

    aggregator = FedLoRAAggregator()
    for site, state in states.items():
        aggregator.accept_model(result_of(site, state, on_disk(state, tmp_path / site)))
    params = aggregator.aggregate_model().params

    assert any("classifier" in name for name in params)
    assert {tensor.dtype for tensor in params.values()} == {torch.bfloat16}
    assert_same(params, tmp_path / "global")


def test_numpy_arrays_are_taken_as_tensors(tmp_path: Path, states: dict[str, StateDict]) -> None:
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global")
    aggregator = FedLoRAAggregator()
    for site, state in states.items():
        arrays = {name: tensor.numpy() for name, tensor in state.tensors.items()}
        aggregator.accept_model(result_of(site, state, arrays))

    assert_same(aggregator.aggregate_model().params, tmp_path / "global")


def test_with_rounds_a_result_is_written_at_once_and_leaves_the_memory(
    tmp_path: Path, states: dict[str, StateDict]
) -> None:
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global")
    aggregator = FedLoRAAggregator(rounds=str(tmp_path / "rounds"), keep_clients=True)
    for site, state in states.items():
        result = result_of(site, state, {k: v.clone() for k, v in state.tensors.items()})
        held = weakref.ref(next(iter(result.params.values())))
        aggregator.accept_model(result)
        del result
        gc.collect()
        assert held() is None
        [written] = (tmp_path / "rounds").glob(f"*/clients/{site}/{FILES[0]}")
        assert load_file(written).keys() == state.tensors.keys()

    assert_same(aggregator.aggregate_model().params, tmp_path / "global")
    [folder] = (tmp_path / "rounds").glob("*/global")
    assert_same(load_file(folder / FILES[0]), tmp_path / "global")


def bad_results(state: StateDict) -> dict[str, tuple[FLModel, str]]:
    """Results that are refused when they arrive, each with the line for the log."""
    name, tensor = next(iter(state.tensors.items()))
    difference = result_of("site-9", state)
    difference.params_type = ParamsType.DIFF
    without = result_of("site-9", state)
    del without.meta["lora"]
    ciphertext = {**state.tensors, name: b"ciphertext"}
    objects = {**state.tensors, name: tensor.numpy().astype(object)}
    return {
        "difference": (difference, "its result is a difference"),
        "without config": (without, r"no config of an adapter in meta\['lora'\]"),
        "config of text": (result_of("site-9", state, lora="r = 4"), "no config of an adapter"),
        "encrypted": (result_of("site-9", state, PROCESSED_ALGORITHM="CKKS"), r"encrypted.*CKKS"),
        "ciphertext": (result_of("site-9", state, ciphertext), f"{name} is of type bytes"),
        "objects": (result_of("site-9", state, objects), f"{name} is of type ndarray"),
        "a list": (result_of("site-9", state, [tensor]), "its parameters are of type list"),
        "count of text": (result_of("site-9", state, num_examples="many"), "'many'"),
        "count of truth": (result_of("site-9", state, num_examples=True), "True"),
    }


@pytest.mark.parametrize("kind", bad_results(StateDict({"a": torch.ones(1)}, {"r": 1})))
def test_a_result_that_is_no_adapter_is_refused_in_a_line_that_names_the_site(
    tmp_path: Path, states: dict[str, StateDict], kind: str, log: Callable[[], list[str]]
) -> None:
    model, reason = bad_results(states["site-1"])[kind]
    aggregator = FedLoRAAggregator()
    for site, state in states.items():
        aggregator.accept_model(result_of(site, state))
    with pytest.raises(InputError, match=f"^site-9: .*{reason}"):
        aggregator.accept_model(model)

    [line] = log()
    assert "site-9 left out" in line
    assert "\n" not in line
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global")
    assert_same(aggregator.aggregate_model().params, tmp_path / "global")


def damaged(state: StateDict, kind: str) -> StateDict:
    tensors, config = dict(state.tensors), dict(state.config)
    if kind == "not finite":
        tensors[A_KEY] = tensors[A_KEY] * float("nan")
    if kind == "other shape":
        tensors[A_KEY] = tensors[A_KEY][:, :-1].clone()
    if kind == "another rank":
        config["r"] = 5
    if kind == "other kind of adapter":
        config["peft_type"] = "IA3"
    return StateDict(tensors, config, state.samples)


KINDS = ["not finite", "other shape", "another rank", "other kind of adapter"]


def test_any_error_of_a_result_is_a_line_in_the_log(
    tmp_path: Path, states: dict[str, StateDict], log: Callable[[], list[str]]
) -> None:
    """Such as that of a reference whose file is gone."""
    lazy = on_disk(states["site-1"], tmp_path / "lazy")
    for path in (tmp_path / "lazy").iterdir():
        path.unlink()
    aggregator = FedLoRAAggregator()
    with pytest.raises(FileNotFoundError, match="No such file"):
        aggregator.accept_model(result_of("site-9", states["site-1"], lazy))

    [line] = log()
    assert "site-9 left out: No such file" in line


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_site_is_skipped_and_named(
    tmp_path: Path, states: dict[str, StateDict], kind: str, spooled: bool,
    log: Callable[[], list[str]],
) -> None:  # fmt: skip
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global")
    aggregator = FedLoRAAggregator(rounds=str(tmp_path / "rounds") if spooled else None)
    for site, state in states.items():
        aggregator.accept_model(result_of(site, state))
    aggregator.accept_model(result_of("site-9", damaged(states["site-1"], kind)))

    assert_same(aggregator.aggregate_model().params, tmp_path / "global")
    [line] = log()
    assert "site-9 left out: " in line


@pytest.mark.parametrize("kind", ["no result", "not finite", "another rank"])
def test_without_a_good_site_the_last_adapter_stays(
    states: dict[str, StateDict], kind: str, log: Callable[[], list[str]]
) -> None:
    aggregator = FedLoRAAggregator()
    before = FLModel(ParamsType.FULL, params=dict(states["site-3"].tensors))
    if kind != "no result":
        for site, state in states.items():
            aggregator.accept_model(result_of(site, damaged(state, kind)))

    after = FLModelUtils.update_model(before, aggregator.aggregate_model())
    assert after.params.keys() == states["site-3"].tensors.keys()
    assert all(after.params[name] is tensor for name, tensor in states["site-3"].tensors.items())
    assert "the global adapter stays as it was" in log()[-1]

    aggregator.reset_stats()
    for site, state in states.items():
        aggregator.accept_model(result_of(site, state))
    assert aggregator.aggregate_model().params_type == ParamsType.FULL


def test_idle_sites_take_part(states: dict[str, StateDict], log: Callable[[], list[str]]) -> None:
    """Two sites that did not train return the same bytes."""
    aggregator = FedLoRAAggregator("flexlora")
    for site in ("site-1", "site-7", "site-8"):
        aggregator.accept_model(result_of(site, states["site-1"]))

    model = aggregator.aggregate_model()
    assert log() == []
    merged = StateDict(model.params, states["site-1"].config)
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        torch.testing.assert_close(update(merged, module), update(states["site-1"], module))


def update(state: StateDict, module: str) -> Tensor:
    name = f"base_model.model.model.layers.0.{module}.lora_{{}}.weight"
    B, A = (state.tensors[name.format(side)].double() for side in "BA")
    return state.scaling * B @ A


@pytest.mark.parametrize(("good", "changes"), [(1, False), (2, True), (3, True)])
def test_too_few_good_sites_change_nothing(
    states: dict[str, StateDict], good: int, changes: bool, log: Callable[[], list[str]]
) -> None:
    aggregator = FedLoRAAggregator(min_completed=2)
    for number, (site, state) in enumerate(states.items()):
        sent = state if number < good else damaged(state, "not finite")
        aggregator.accept_model(result_of(site, sent))
    model = aggregator.aggregate_model()

    assert (model.params_type == ParamsType.FULL) == changes
    assert bool(model.params) == changes
    assert (": the global adapter stays" in ": " + " ".join(log())) != changes


def test_a_boastful_site_is_left_out(
    tmp_path: Path, states: dict[str, StateDict], log: Callable[[], list[str]]
) -> None:
    aggregate([saved(states, tmp_path / "clients")], tmp_path / "global")
    aggregator = FedLoRAAggregator()
    for site, state in states.items():
        aggregator.accept_model(result_of(site, state))
    aggregator.accept_model(result_of("site-9", states["site-1"], num_examples=1e9))

    assert_same(aggregator.aggregate_model().params, tmp_path / "global")
    [line] = log()
    assert "site-9 left out: " in line


def test_scatter_and_gather_takes_the_name_of_the_connection(
    states: dict[str, StateDict], log: Callable[[], list[str]]
) -> None:
    """A site cannot take the name of another."""
    aggregator = FedLoRAAggregator()
    for site, state in states.items():
        result = result_of("site-2", state)
        accepted = aggregator.accept(FLModelUtils.to_shareable(result), context(site=site))
        assert accepted
    bad = FLModelUtils.to_shareable(result_of("site-1", states["site-1"], lora=None))
    assert not aggregator.accept(bad, context(site="site-9"))

    assert ["site-9" in line for line in log()] == [True]
    model = from_shareable(aggregator.aggregate(context()))
    assert model.data_kind == DataKind.WEIGHTS
    assert model.data[A_KEY].shape[0] == 16


def test_the_metrics_are_means_by_samples(states: dict[str, StateDict]) -> None:
    aggregator = FedLoRAAggregator()
    for loss, (site, state) in enumerate(states.items()):
        model = result_of(site, state)
        model.metrics = {"loss": float(loss), "note": "text"}
        aggregator.accept_model(model)

    assert aggregator.aggregate_model().metrics == {"loss": pytest.approx((200 + 2 * 100) / 600)}


@pytest.mark.parametrize("samples", [-300.0, float("nan"), 1e300])
def test_the_metrics_of_a_site_that_is_left_out_do_not_count(
    states: dict[str, StateDict], samples: float
) -> None:
    aggregator = FedLoRAAggregator()
    for site, state in states.items():
        model = result_of(site, state)
        model.metrics = {"loss": 2.0}
        aggregator.accept_model(model)
    bad = result_of("site-9", states["site-1"], num_examples=samples)
    bad.metrics = {"loss": -1000.0}
    aggregator.accept_model(bad)

    result = aggregator.aggregate_model()
    assert result.params_type == ParamsType.FULL
    assert result.metrics == {"loss": pytest.approx(2.0)}


#: The alpha of each rank.
ALPHAS: dict[str, Callable[[int], float]] = {
    "equal scaling": lambda rank: 2 * rank,
    "equal alpha": lambda rank: 16,
}


@pytest.fixture(params=ALPHAS)
def sites(request: pytest.FixtureRequest) -> dict[str, StateDict]:
    return make_states(ALPHAS[request.param])


@pytest.fixture
def trained(tmp_path: Path, sites: dict[str, StateDict]) -> FLContextManager:
    """The server after a round, whose global adapter is in `global`."""
    manager = server()
    aggregator = FedLoRAAggregator("flexlora")
    aggregator.handle_event(EventType.START_RUN, context(manager))
    for site, state in sites.items():
        aggregator.accept_model(result_of(site, state))
    aggregator.aggregate_model()
    aggregate([saved(sites, tmp_path / "clients")], tmp_path / "global",
              AggregateOptions(method="flexlora"))  # fmt: skip
    return manager


def test_each_site_gets_the_global_adapter_as_distribute_writes_it(
    tmp_path: Path, sites: dict[str, StateDict], trained: FLContextManager
) -> None:
    distribute(tmp_path / "global", tmp_path / "sites", [tmp_path / "clients"])
    whole = StateDict.load(tmp_path / "global")

    for site, state in sites.items():
        sent = sent_to(site, trained, FedLoRARankFilter(), dict(whole.tensors))
        got = StateDict(sent.params, sent.meta["lora"])
        expected = StateDict.load(tmp_path / "sites" / site)
        assert got.rank == state.rank
        assert got.scaling == pytest.approx(state.scaling)
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            torch.testing.assert_close(
                update(got, module), update(expected, module), rtol=1e-5, atol=1e-6
            )


def test_a_site_loads_it_at_its_rank_and_scaling(
    tmp_path: Path, sites: dict[str, StateDict], trained: FLContextManager
) -> None:
    whole = StateDict.load(tmp_path / "global")
    for site, state in sites.items():
        model = peft_model(state.rank, state.config["lora_alpha"], seed=9)
        load_adapter(model, sent_to(site, trained, FedLoRARankFilter(), dict(whole.tensors)))
        loaded = StateDict.of(model)
        distribute(tmp_path / "global", tmp_path / f"of-{site}", (),
                   DistributeOptions(ranks=(state.rank,)))  # fmt: skip
        expected = StateDict.load(tmp_path / f"of-{site}" / f"rank-{state.rank}")
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            torch.testing.assert_close(
                update(loaded, module), update(expected, module), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("rank", [2, 6, 16])
def test_an_unknown_site_gets_the_whole_adapter_and_cuts_it(
    tmp_path: Path, trained: FLContextManager, rank: int
) -> None:
    whole = StateDict.load(tmp_path / "global")
    sent = sent_to("site-9", trained, FedLoRARankFilter(), dict(whole.tensors))
    assert sent.params[A_KEY].shape[0] == 16

    model = peft_model(rank, 5, seed=9)
    load_adapter(model, sent)

    distribute(tmp_path / "global", tmp_path / "sites", (), DistributeOptions(ranks=(rank,)))
    expected = StateDict.load(tmp_path / "sites" / f"rank-{rank}")
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        torch.testing.assert_close(
            update(StateDict.of(model), module), update(expected, module), rtol=1e-5, atol=1e-6
        )


def test_an_unknown_site_approximates_an_adapter_without_order(
    tmp_path: Path, trained: FLContextManager
) -> None:
    """As flora's, in which the clients' factors follow one another: here, the least come first."""
    whole = StateDict.load(tmp_path / "global")
    tensors = {
        name: tensor.flip(0 if "lora_A" in name else 1).contiguous() if "lora_" in name else tensor
        for name, tensor in whole.tensors.items()
    }
    sent = sent_to("site-9", trained, FedLoRARankFilter(), tensors)
    sent.params = tensors
    sent.meta["lora_ordered"] = False
    model = peft_model(6, 5, seed=9)
    load_adapter(model, sent)

    distribute(tmp_path / "global", tmp_path / "sites", (), DistributeOptions(ranks=(6,)))
    expected = StateDict.load(tmp_path / "sites/rank-6")
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        torch.testing.assert_close(
            update(StateDict.of(model), module), update(expected, module), rtol=1e-5, atol=1e-6
        )


def test_other_kinds_of_data_pass_the_filter_unchanged() -> None:
    rank_filter = FedLoRARankFilter({"site-1": 4})
    shareable = DXO(DataKind.METRICS, data={"loss": 1.0}).to_shareable()

    assert from_shareable(rank_filter.process(shareable, context(site="site-1"))).data == {
        "loss": 1.0
    }


def first_adapter(folder: Path, rank: int = 16) -> Path:
    """A first global adapter, as `fedlora init` makes it: B is zero."""
    state = StateDict.of(peft_model(rank, 2 * rank))
    tensors = {k: v * ("lora_A" in k) for k, v in state.tensors.items()}
    StateDict(tensors, state.config).save(folder)
    return folder


def test_the_first_round_has_the_ranks_of_the_filter(tmp_path: Path) -> None:
    manager = server()
    persistor = FedLoRAPersistor(str(first_adapter(tmp_path / "first")))
    weights = persistor.load_model(context(manager))["weights"]
    rank_filter = FedLoRARankFilter({"site-1": 4, "site-2": 8})

    for site, rank in {"site-1": 4, "site-2": 8, "site-3": 16}.items():
        sent = sent_to(site, manager, rank_filter, weights)
        assert sent.params[A_KEY].shape[0] == rank
        assert (sent.meta["lora"]["r"], sent.meta["lora"]["lora_alpha"]) == (rank, 2 * rank)
        torch.testing.assert_close(
            sent.params[A_KEY] @ sent.params[A_KEY].T,
            weights[A_KEY][:rank] @ weights[A_KEY][:rank].T,
        )


@pytest.mark.parametrize("alpha", [None, 16, 3.5])
def test_the_first_round_has_the_alphas_of_the_filter(tmp_path: Path, alpha: float | None) -> None:
    StateDict.of(peft_model(16, 32)).save(tmp_path / "first")
    manager = server()
    persistor = FedLoRAPersistor(str(tmp_path / "first"))
    weights = persistor.load_model(context(manager))["weights"]
    rank_filter = FedLoRARankFilter({"site-1": 4}, alpha and {"site-1": alpha})
    sent = sent_to("site-1", manager, rank_filter, weights)

    got, first = StateDict(sent.params, sent.meta["lora"]), StateDict.load(tmp_path / "first")
    assert (got.config["r"], got.config["lora_alpha"]) == (4, alpha or 8)
    B, A = (first.tensors[A_KEY.replace("lora_A", f"lora_{side}")].double() for side in "BA")
    expected = 2.0 * B[:, :4] @ A[:4]
    torch.testing.assert_close(update(got, "self_attn.q_proj"), expected, rtol=1e-5, atol=1e-6)


def run_rounds(folder: Path, count: int, **arguments: Any) -> None:
    """A job of `count` rounds on the folder, with sites that add noise to what they are sent."""
    manager = server()
    rounds = str(folder / "rounds")
    persistor = FedLoRAPersistor(str(folder.parent / "first"))
    rank_filter = FedLoRARankFilter({site: rank for site, (rank, _) in SITES.items()})
    aggregator = FedLoRAAggregator(rounds=rounds, **arguments)
    aggregator.handle_event(EventType.START_RUN, context(manager))
    model = FLModel(ParamsType.FULL, params=persistor.load_model(context(manager))["weights"])
    for _ in range(count):
        aggregator.reset_stats()
        for site, (rank, samples) in SITES.items():
            sent = sent_to(site, manager, rank_filter, model.params)
            assert sent.params[A_KEY].shape[0] == rank
            tensors = dict(sorted(sent.params.items()))
            seed = float(sum(tensor.double().sum() for tensor in tensors.values()))
            noise = torch.Generator().manual_seed(abs(int(1e6 * seed)) % 2**31 + samples)
            tensors = {
                name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
                for name, tensor in tensors.items()
            }
            state = StateDict(tensors, sent.meta["lora"], samples)
            aggregator.accept_model(result_of(site, state))
        model = FLModelUtils.update_model(model, aggregator.aggregate_model())
    ctx = context(manager)
    ctx.set_prop("__app_root__", str(folder), private=True, sticky=True)
    persistor.save_model({"weights": model.params, "meta": {}}, ctx)


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.5, "quorum": 0.3}])
def test_two_jobs_of_two_rounds_write_the_bytes_of_one_job_of_four(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    first_adapter(tmp_path / "first")
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    run_rounds(tmp_path / "once", 4, **arguments)
    run_rounds(tmp_path / "twice", 2, **arguments)
    run_rounds(tmp_path / "twice", 2, **arguments)

    folders = sorted(path.name for path in (tmp_path / "once" / "rounds").iterdir())
    assert len(folders) == 4
    for folder in folders:
        for name in FILES:
            one, two = (tmp_path / run / "rounds" / folder / "global" / name
                        for run in ("once", "twice"))  # fmt: skip
            assert one.read_bytes() == two.read_bytes(), folder
    last = tmp_path / "twice" / "rounds" / folders[-1] / "global" / FILES[0]
    assert_same(load_file(tmp_path / "twice" / "global" / FILES[0]), last.parent)


def test_the_best_adapter_is_that_of_the_event(tmp_path: Path) -> None:
    manager = server()
    persistor = FedLoRAPersistor(str(first_adapter(tmp_path / "first")))
    ctx = context(manager)
    persistor.load_model(ctx)
    ctx.set_prop("__app_root__", str(tmp_path), private=True, sticky=True)
    persistor.handle_event(AppEventType.ROUND_STARTED, ctx)
    assert not (tmp_path / "best_global").exists()
    persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, ctx)
    persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, ctx)

    assert_same(load_file(tmp_path / "best_global" / FILES[0]), tmp_path / "first")


def with_stored(aggregator: FedLoRAAggregator, rank: int) -> list[str]:
    """Load a global adapter of this rank by another persistor; the reasons of fatal errors."""
    ctx = context()
    tensors = dict(StateDict.of(peft_model(rank, 2 * rank)).tensors)
    aggregator.handle_event(EventType.START_RUN, ctx)
    stored = {"weights": tensors, "meta": {}}
    ctx.set_prop(AppConstants.GLOBAL_MODEL, stored, private=True, sticky=True)
    aggregator.handle_event(AppEventType.INITIAL_MODEL_LOADED, ctx)
    return ctx.get_engine().fatal


@pytest.mark.parametrize("rank", [2, 16, 24])
def test_the_rank_of_another_persistor_stays(states: dict[str, StateDict], rank: int) -> None:
    aggregator = FedLoRAAggregator()
    assert with_stored(aggregator, rank) == []
    for site in ("site-1", "site-2"):
        aggregator.accept_model(result_of(site, states[site]))

    assert aggregator.aggregate_model().params[A_KEY].shape[0] == rank


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"method": "flora"}, "flora, with a rank that changes"),
        ({"options": {"energy": 0.9}}, "the rank may change"),
    ],
)
def test_a_rank_that_changes_ends_the_job_of_another_persistor(
    arguments: dict[str, Any], reason: str
) -> None:
    [line] = with_stored(FedLoRAAggregator(**arguments), 16)

    assert reason in line
    assert line.endswith("start from `adapter`, so that FedLoRAPersistor stores any rank")


def test_a_rank_that_another_persistor_would_refuse_is_refused_in_a_line(
    states: dict[str, StateDict], log: Callable[[], list[str]]
) -> None:
    aggregator = FedLoRAAggregator(rank=3)
    assert with_stored(aggregator, 16) == []
    for site, state in states.items():
        aggregator.accept_model(result_of(site, state))

    with pytest.raises(InputError, match=r"\(3, \d+\), but NVFlare's persistor keeps \(16, \d+\)"):
        aggregator.aggregate_model()
    assert "start from `adapter`" in log()[-1]


def test_a_folder_of_other_rounds_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    first_adapter(tmp_path / "rounds" / "round-07").rename(tmp_path / "global")
    (tmp_path / "rounds" / "round-07").mkdir()
    (tmp_path / "global").rename(tmp_path / "rounds" / "round-07" / "global")
    ctx = context()
    FedLoRAAggregator(rounds=str(tmp_path / "rounds")).handle_event(EventType.START_RUN, ctx)

    [line] = ctx.get_engine().fatal
    assert "its rounds are round-07" in line


def test_the_first_adapter_of_another_persistor_is_cut_only_before_training() -> None:
    state = StateDict.of(peft_model(16, 32))
    zero = {k: v * ("lora_A" in k) for k, v in state.tensors.items()}
    manager = server()
    rank_filter = FedLoRARankFilter({"site-1": 4})

    assert sent_to("site-1", manager, rank_filter, zero).params[A_KEY].shape[0] == 4
    assert sent_to("site-2", manager, rank_filter, zero).params[A_KEY].shape[0] == 16
    with pytest.raises(InputError, match="it is trained, and its alpha is unknown"):
        sent_to("site-1", manager, rank_filter, dict(state.tensors))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"method": "mean"}, "unknown method mean"),
        ({"quorum": 2.0}, "in \\[0, 1\\]"),
        ({"options": {"rank": 4}}, "'rank' is no further option"),
        ({"options": {"tempo": 4}}, "'tempo' is no further option"),
        ({"on_bad_client": "ignore"}, "refuse, skip"),
    ],
)
def test_wrong_arguments_are_refused_where_the_job_is_made(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        FedLoRAAggregator(**arguments)


@pytest.mark.parametrize("samples", [7, 0.5])
def test_the_metadata_of_a_result_is_json(samples: float) -> None:
    model = peft_model(4, 8)
    meta = lora_meta(model, samples)

    assert meta["num_examples"] == samples
    assert (meta["lora"]["r"], meta["lora"]["lora_alpha"]) == (4, 8)
    assert json.loads(json.dumps(meta)) == meta
    assert lora_meta(model, samples, "count")["count"] == samples
    aggregator = FedLoRAAggregator(weight_key="count")
    for site in ("site-1", "site-2"):
        params = get_peft_model_state_dict(model)
        full = {"client_name": site, **lora_meta(model, samples, "count")}
        aggregator.accept_model(FLModel(ParamsType.FULL, params=params, meta=full))
    assert aggregator.aggregate_model().params_type == ParamsType.FULL
