"""What PEFT applies after loading the global adapter, on tiny models and adapters of its own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import oracle
from support.adapters import relative_error, truncated
from support.models import (
    CASES,
    Case,
    adapted,
    delta_of,
    llama,
    save,
    train,
    wrap,
)

from fedlora_cli import METHODS, AggregateOptions, InputError, aggregate


@pytest.mark.parametrize("method", ["raflora", "flexlora", "flora", "fedavg", "rbla"])
@pytest.mark.parametrize("name", CASES)
def test_peft_applies_exactly_the_aggregated_update(tmp_path: Path, name: str, method: str) -> None:
    case = CASES[name]
    torch.manual_seed(99)
    base = case.build()
    clients = train(case, base, tmp_path)

    report = aggregate(
        [tmp_path / "round"], tmp_path / "out", AggregateOptions(method=method, verify=True)
    )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
    layers = adapted(loaded)
    assert set(layers) == {module for client in clients for module in client.factors}
    for module, layer in layers.items():
        holders = [c for c in clients if module in c.factors]
        given = [(*client.factors[module], float(client.samples)) for client in holders]
        expected = oracle.aggregate(method, given)
        if METHODS[method].compress == "svd":
            expected = truncated(expected, report.rank)
        assert relative_error(delta_of(layer), expected) < 1e-5
    state = loaded.state_dict()
    for key in {key for client in clients for key in client.heads}:
        holders = [client for client in clients if key in client.heads]
        total = sum(client.samples for client in holders)
        mean = sum(client.samples / total * client.heads[key].double() for client in holders)
        torch.testing.assert_close(state[key].double(), mean, rtol=1e-6, atol=1e-7)


def test_training_goes_on_from_the_global_adapter_in_every_direction(tmp_path: Path) -> None:
    """Every row of A or column of B gets a gradient, padding included."""
    case = CASES["vit"]
    base = case.build()
    train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(rank=20))

    model = PeftModel.from_pretrained(base, str(tmp_path / "out"), is_trainable=True)
    model(torch.randn(4, 3, 8, 8), labels=torch.arange(4)).loss.backward()

    for layer in adapted(model).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        moved = A.grad.abs().amax(dim=1) + B.grad.abs().amax(dim=0)
        assert A.shape[0] == 20
        assert moved.min() > 0


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "DoRA, .* --dora approximate"),
        ({"init_lora_weights": "pissa"}, r"'pissa', .*path_initial_model_for_weight"),
        ({"init_lora_weights": "olora"}, r"'olora', .*path_initial_model_for_weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_yet_is_refused_by_name(tmp_path: Path, config, named: str) -> None:
    arguments = {"r": 2, "target_modules": ["q_proj"]} | config
    train(Case(llama, (arguments,)), llama(), tmp_path)

    with pytest.raises(InputError, match=named):
        aggregate([tmp_path / "round"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_peft_types_are_refused_by_name(tmp_path: Path) -> None:
    from peft import IA3Config

    model = wrap(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    save(model, tmp_path / "client")

    with pytest.raises(InputError, match="peft_type is 'IA3'"):
        aggregate([tmp_path / "client"], tmp_path / "out")
