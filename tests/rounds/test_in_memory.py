"""Adapters in memory: the checks and the bytes of folders, errors that name the client."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from support.adapters import Spec, make, relative_error
from support.models import llama
from support.rounds import make_round

from fedlora_cli import (
    METHODS,
    AggregateOptions,
    DistributeOptions,
    FedloraError,
    InitOptions,
    InputError,
    StateDict,
    UsageError,
    aggregate,
    aggregate_state_dicts,
    cut,
    distribute,
    distribute_state_dict,
    init_state_dicts,
    initialize,
)

FILES = ("adapter_model.safetensors", "adapter_config.json")
A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"


#: PEFT before 0.19 looks for the base model's config, also if the model has no name.
_WITHOUT_NAME = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")


def loaded(root: Path) -> dict[str, StateDict]:
    return {folder.name: StateDict.load(folder) for folder in sorted(root.iterdir())}


def with_heads(root: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Clients of ranks 4, 2 and 5 with a head, a rank pattern and other alphas."""
    clients = root / "clients"
    for name, rank, samples in (("ann", 4, 30), ("bob", 2, 10), ("cy", 5, 7)):
        head = torch.randn(3, 12, generator=torch.Generator().manual_seed(rank)).to(dtype)
        spec = Spec(
            name, rank, samples, alpha=2 * rank + 1, dtype=dtype, seed=rank,
            ranks={"layers.0.v_proj": rank - 1}, tensors={"score.weight": head},
            config={"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        )  # fmt: skip
        make(clients, spec)
    return clients


def assert_same_files(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_the_bytes_of_folders(
    tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    clients = with_heads(tmp_path, dtype)
    if method == "ffa":  # all clients share A
        shared = StateDict.load(clients / "cy").tensors
        for folder in clients.iterdir():
            state = StateDict.load(folder)
            tensors = {
                name: shared[name][: len(tensor)] if "lora_A" in name else tensor
                for name, tensor in state.tensors.items()
            }
            replace(state, tensors=tensors).save(folder, force=True)
    options = AggregateOptions(method=method)
    aggregate(clients, tmp_path / "global", options)
    state, report = aggregate_state_dicts(loaded(clients), options)
    state.save(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", tmp_path / "global")
    assert [client.samples for client in report.clients] == [30, 10, 7]
    aggregate_state_dicts(loaded(clients), options, output=tmp_path / "written")
    assert_same_files(tmp_path / "written", tmp_path / "global")


def test_momentum_and_previous_write_the_bytes_of_folders(tmp_path: Path) -> None:
    clients = with_heads(tmp_path)
    make(tmp_path, Spec("previous", 6, None, seed=8))
    make(tmp_path, Spec("before_previous", 3, None, seed=9))
    earlier = {name: tmp_path / name for name in ("previous", "before_previous")}
    options = AggregateOptions(momentum=0.5, quorum=0.9, verify=True)
    aggregate(clients, tmp_path / "global", replace(options, **earlier))
    states = {name: StateDict.load(folder) for name, folder in earlier.items()}
    state, report = aggregate_state_dicts(loaded(clients), options, **states)
    state.save(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", tmp_path / "global")
    assert report.verification is not None


@_WITHOUT_NAME
def test_a_copy_of_a_peft_model_aggregates_like_its_saved_folder(tmp_path: Path) -> None:
    states = {}
    for name, rank in (("ann", 2), ("bob", 4)):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(llama(), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "clients" / name)
        (tmp_path / "clients" / name / "fedlora.json").write_text('{"samples": 5}')
        states[name] = StateDict.of(model, 5)
        with torch.no_grad():  # later training leaves the copy alone
            for parameter in model.parameters():
                parameter.zero_()
    aggregate(tmp_path / "clients", tmp_path / "global")
    state, _ = aggregate_state_dicts(states)
    state.save(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", tmp_path / "global")


@_WITHOUT_NAME
def test_the_result_loads_into_a_peft_model_that_applies_the_mean() -> None:
    states, updates = {}, []
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        updates.append(layer.get_delta_weight("default").detach().clone())
        states[f"client-{seed}"] = StateDict.of(model, 1)
    merged, _ = aggregate_state_dicts(states, AggregateOptions(method="flora"))
    model = get_peft_model(llama(), merged.lora_config())
    assert any(parameter.requires_grad for parameter in model.parameters())
    set_peft_model_state_dict(model, dict(merged.tensors))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    mean = (updates[0] + updates[1]) / 2
    assert relative_error(
        layer.get_delta_weight("default").detach().numpy(), mean.numpy()
    ) < 1e-6  # fmt: skip


def test_distribution_in_memory_writes_the_bytes_of_folders(tmp_path: Path) -> None:
    clients = with_heads(tmp_path)
    aggregate(clients, tmp_path / "global")
    source = StateDict.load(tmp_path / "global")
    assert source.samples is None
    distribute(tmp_path / "global", tmp_path / "out", [clients])
    for name, state in distribute_state_dict(source, like=loaded(clients)).items():
        state.save(tmp_path / f"memory-{name}")
        assert_same_files(tmp_path / f"memory-{name}", tmp_path / "out" / name)
    distribute(tmp_path / "global", tmp_path / "ranks", (), DistributeOptions(ranks=(2, 7)))
    for rank, state in distribute_state_dict(source, ranks=[2, 7]).items():
        assert state.rank == rank
        state.save(tmp_path / f"memory-{rank}")
        assert_same_files(tmp_path / f"memory-{rank}", tmp_path / "ranks" / f"rank-{rank}")


def test_initial_adapters_in_memory_are_those_of_folders(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    options = InitOptions(ranks=(2, 4), target_modules=("q_proj", "v_proj"))
    initialize(tmp_path / "base", tmp_path / "start", (), options)
    for rank, state in init_state_dicts(str(tmp_path / "base"), options).items():
        state.save(tmp_path / f"memory-{rank}")
        assert_same_files(tmp_path / f"memory-{rank}", tmp_path / "start" / f"rank-{rank}")


@pytest.mark.parametrize("scaling", [None, 0.25, 3.0])
@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_a_cut_is_the_distributed_adapter_at_every_scaling(
    tmp_path: Path, rank: int, scaling: float | None
) -> None:
    clients = with_heads(tmp_path)
    merged, _ = aggregate_state_dicts(loaded(clients))
    piece = cut(merged, rank, scaling)
    assert piece.rank == rank
    assert piece.scaling == pytest.approx(merged.scaling if scaling is None else scaling)
    exact = distribute_state_dict(merged, ranks=[rank])[rank]
    for module in ("layers.0.q_proj", "layers.0.v_proj"):
        update = [
            state.scaling
            * state.tensors[f"base_model.model.{module}.lora_B.weight"].double()
            @ state.tensors[f"base_model.model.{module}.lora_A.weight"].double()
            for state in (piece, exact)
        ]
        assert relative_error(update[0].numpy(), update[1].numpy()) < 1e-5
    assert torch.equal(
        piece.tensors["base_model.model.score.weight"],
        merged.tensors["base_model.model.score.weight"],
    )


def test_a_cut_at_its_own_scaling_is_a_slice(tmp_path: Path) -> None:
    made = make(tmp_path, Spec("ann", 4, alpha=6))
    whole = StateDict.load(made.folder)
    piece = cut(whole, 3)
    assert torch.equal(piece.tensors[A], whole.tensors[A][:3])
    assert torch.equal(piece.tensors[B], whole.tensors[B][:, :3])
    assert piece.config["lora_alpha"] == 4.5


Change = dict[str, Any]


def changed(
    state: StateDict,
    *,
    config: Change | None = None,
    tensors: Change | None = None,
    samples: Any = 10,
    **factors: Any,
) -> StateDict:
    names = {"A": A, "B": B}
    new = {names[name]: value for name, value in factors.items()}
    return replace(
        state,
        tensors={**state.tensors, **new, **(tensors or {})},
        config={**state.config, **(config or {})},
        samples=samples,
    )


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"B": torch.full((12, 2), torch.nan)}, r"^client bob: .*q_proj\.lora_B.* NaN"),
    "shape": ({"A": torch.ones(2, 9)}, r"^client bob: .*layers\.0\.q_proj is linear 12 x 9"),
    "rank": ({"config": {"r": -4}}, r"^client bob: r is -4"),
    "no number": ({"config": {"lora_alpha": "x"}}, r"^client bob: lora_alpha is 'x'"),
    "no tensor": ({"A": [1.0]}, r"^client bob: .*lora_A\.weight is of type list"),
    "objects": ({"A": np.array([{}])}, r"^client bob: .*lora_A\.weight is of type ndarray"),
    "other byte order": ({"A": np.ones((2, 20), ">f4")}, r"^client bob: .*is of type ndarray"),
    "float8": (
        {"A": torch.ones(2, 20).to(torch.float8_e5m2)},
        r"^client bob: .*lora_A\.weight has torch.float8_e5m2",
    ),
    "sparse": ({"A": torch.ones(2, 20).to_sparse()}, r"^client bob: .*torch.sparse_coo"),
    "unprintable name": (
        {"tensors": {"half \ud800": torch.ones(1)}},
        r"^client bob: a tensor named 'half \\ud800'; give tensors plain names",
    ),
    "number as a name": ({"tensors": {7: torch.ones(1)}}, r"^client bob: a tensor named 7"),
    "too many tensors": (
        {"tensors": dict.fromkeys(map(str, range(150_001)), torch.ones(1))},
        r"^client bob: the weights file: it would have 150006 tensors",
    ),
    "text as a count": ({"samples": "30"}, r"^client bob: its sample count is a str"),
    "negative count": ({"samples": -1}, r"^client bob: samples: -1"),
    "DoRA": ({"config": {"use_dora": True}}, r"^client bob: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_names_the_client_and_the_module(tmp_path: Path, fault: str) -> None:
    states = loaded(with_heads(tmp_path))
    change, message = FAULTS[fault]
    states["bob"] = changed(states["bob"], **change)
    with pytest.raises(InputError, match=message) as caught:
        aggregate_state_dicts(states)
    assert "--" not in str(caught.value)
    assert "memory:" not in str(caught.value)


def test_a_faulty_client_is_skipped_and_named(tmp_path: Path) -> None:
    states = loaded(with_heads(tmp_path))
    states["bob"] = changed(states["bob"], B=torch.full((12, 2), torch.inf))
    _, report = aggregate_state_dicts(states, AggregateOptions(on_bad_client="skip"))
    assert [client.name for client in report.clients] == ["ann", "cy"]
    [left_out] = report.left_out
    assert left_out.name == "bob"
    assert "lora_B" in left_out.reason
    assert "--" not in left_out.reason


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a\\b", 7, "nul\0"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(tmp_path: Path, name: Any) -> None:
    state = StateDict.load(make(tmp_path, Spec("ann", 2)).folder)
    with pytest.raises(InputError, match=r"^a client's name: .* no name of a folder"):
        aggregate_state_dicts({name: state})


def test_arguments_that_do_not_fit_are_usage_errors_in_words_of_python(tmp_path: Path) -> None:
    states = loaded(with_heads(tmp_path))
    with pytest.raises(UsageError, match=r"^clients: an empty mapping"):
        aggregate_state_dicts({})
    with pytest.raises(UsageError, match=r"^dry_run: given for adapters in memory"):
        aggregate_state_dicts(states, AggregateOptions(dry_run=True))
    with pytest.raises(UsageError, match=r"^cluster: .* in the memory of this process"):
        aggregate_state_dicts(states, AggregateOptions(cluster="processes:2"))
    with pytest.raises(UsageError, match=r"^rank: 99, where no module has more than 12"):
        cut(states["ann"], 99)
    with pytest.raises(FedloraError, match=r"^like: neither like nor ranks? is given"):
        distribute_state_dict(states["ann"], ranks=[])


def test_configs_of_peft_become_plain_values(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules={"v_proj", "q_proj"}, use_rslora=True)
    state = StateDict({}, config)
    assert state.config["target_modules"] == ["q_proj", "v_proj"]
    assert state.config["peft_type"] == "LORA"
    assert state.scaling == 3.0
    assert repr(StateDict({}, config, 30)) == "<StateDict of rank 4: 0 tensors, 30 samples>"
    assert json.loads(json.dumps(state.config)) == state.config
    with pytest.raises(InputError, match=r"^config: no JSON object \(a object\)"):
        StateDict({}, {"r": object()})
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InputError, match=r"^config: no JSON object \(.*recursion"):
        StateDict({}, {"r": nested})
    wrong: Any = [1]
    with pytest.raises(InputError, match=r"^config: no JSON object but a list"):
        StateDict({}, wrong)


@pytest.mark.parametrize("samples", [np.int64(30), np.float32(30), 30.0, Fraction(30)])
def test_every_kind_of_number_is_a_sample_count(tmp_path: Path, samples: Any) -> None:
    states = loaded(with_heads(tmp_path))
    states["ann"] = replace(states["ann"], samples=samples)
    assert aggregate_state_dicts(states)[1].clients[0].samples == 30


def test_a_global_adapter_with_a_large_report_loads(tmp_path: Path) -> None:
    aggregate(with_heads(tmp_path), tmp_path / "global")
    report = json.loads((tmp_path / "global/fedlora.json").read_text())
    report["padding"] = "x" * (16 * 1024 * 1024)  # above the limit of other documents
    (tmp_path / "global/fedlora.json").write_text(json.dumps(report))
    state = StateDict.load(tmp_path / "global")
    assert (state.rank, state.samples) == (5, None)


def test_a_saved_state_dict_loads_again_and_never_replaces_other_files(tmp_path: Path) -> None:
    state = StateDict.load(make(tmp_path, Spec("ann", 3, 12)).folder)
    state.save(tmp_path / "copy")
    again = StateDict.load(tmp_path / "copy")
    assert (again.samples, again.config, again.metadata) == (12, state.config, state.metadata)
    assert all(torch.equal(again.tensors[name], t) for name, t in state.tensors.items())
    with pytest.raises(FedloraError, match="it already exists"):
        state.save(tmp_path / "copy")
    (tmp_path / "copy" / "thesis.tex").touch()
    with pytest.raises(FedloraError, match=r"it holds thesis\.tex"):
        state.save(tmp_path / "copy", force=True)


def test_arrays_of_numpy_count_like_tensors(tmp_path: Path) -> None:
    clients = with_heads(tmp_path)
    states = loaded(clients)
    arrays = {
        name: replace(state, tensors={k: t.numpy().copy("F") for k, t in state.tensors.items()})
        for name, state in states.items()
    }
    arrays["ann"].save(tmp_path / "arrays")
    states["ann"].save(tmp_path / "tensors")
    assert_same_files(tmp_path / "arrays", tmp_path / "tensors")
    one, other = aggregate_state_dicts(states)[0], aggregate_state_dicts(arrays)[0]
    assert all(torch.equal(other.tensors[name], t) for name, t in one.tensors.items())


def test_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = loaded(make_round(tmp_path / "clients")[0].folder.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    merged, _ = aggregate_state_dicts(states, AggregateOptions(verify=True))
    assert merged.rank == max(state.rank for state in states.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients"]


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        ({}, 8, 1.0),
        ({"lora_alpha": 16}, 8, 2.0),
        ({"r": 4}, 4, 2.0),
        ({"use_rslora": True}, 8, 8**0.5),
    ],
)
def test_a_config_has_the_defaults_of_peft(
    config: dict[str, Any], rank: int, scaling: float
) -> None:
    state = StateDict({}, {"peft_type": "LORA", **config})

    assert state.rank == LoraConfig(**config).r == rank
    assert state.scaling == pytest.approx(scaling)
