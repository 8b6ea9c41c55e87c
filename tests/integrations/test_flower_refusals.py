"""What cannot be combined with FedLoRA is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from support.flower import RANKS, Calls, of_ranks, peft_model, strategy

from fedlora_cli import StateDict
from fedlora_cli.errors import InputError
from fedlora_cli.integrations.federation import DEFAULTS
from fedlora_cli.integrations.flower import FedLoRA, load_adapter, to_tensors

WRAPPERS: list[Callable[[Any], Any]] = [
    lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, 3),
    lambda inner: DifferentialPrivacyClientSideFixedClipping(inner, 0.1, 1.0, 3),
    lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(inner, 0.1, 3),
    lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(inner, 0.1, 3),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_for_differential_privacy_is_refused_before_any_training(
    wrapper: Callable[[Any], Any],
) -> None:
    grid = Calls(of_ranks().app(), RANKS)
    made, arrays = strategy()

    with pytest.raises(AggregationError, match="differential privacy, changes arrays; start FedL"):
        wrapper(made).start(grid, arrays, num_rounds=1)
    assert grid.messages == []


def test_a_strategy_may_be_started_after_its_summary() -> None:
    made, arrays = strategy()
    made.summary()
    made.start(Calls(of_ranks().app(), RANKS), arrays, num_rounds=1)

    assert made.round == 1


class Noisy(FedLoRA):  # type: ignore[misc]
    """A strategy that changes arrays which FedLoRA does not see."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({k: Array(v.numpy() + 1) for k, v in arrays.items()}), metrics


def test_arrays_that_others_have_changed_are_refused() -> None:
    made, arrays = strategy(kind=Noisy)

    with pytest.raises(AggregationError, match="changes arrays"):
        made.start(Calls(of_ranks().app(), RANKS), arrays, num_rounds=2)


@pytest.mark.parametrize("module", ["flwr.client.mod", "flwr.client.mod.secure_aggregation"])
@pytest.mark.parametrize("name", ["secagg_mod", "secaggplus_mod"])
def test_clients_with_secure_aggregation_are_named(
    module: str, name: str, lines: list[str]
) -> None:
    mod = getattr(pytest.importorskip(module), name, None)
    if mod is None:
        pytest.skip(f"this flwr has no {name} in {module}")
    made, arrays = strategy()
    made.start(Calls(of_ranks().app(mods=[mod]), RANKS), arrays, num_rounds=1)

    assert made.round == 0
    found = [line for line in lines if line.startswith("left out")]
    assert len(found) == 3
    assert all("SecAgg+) hides the single adapters" in line for line in found)
    assert all(
        line.endswith("remove secagg_mod and secaggplus_mod from the ClientApp") for line in found
    )


def test_a_workflow_for_secure_aggregation_is_refused() -> None:
    """DefaultWorkflow of flwr.server.workflow, whatever its fit workflow, begins by this call."""
    made, _ = strategy()
    with pytest.raises(AggregationError, match="SecAgg"):
        made.initialize_parameters(client_manager=None)


def test_noise_of_clients_is_allowed() -> None:
    """Flower's mod compares what came and went, so the client must get its rank exactly."""
    mod = LocalDpMod(clipping_norm=1.0, sensitivity=1e-3, epsilon=1.0, delta=1e-3)

    def at_training(message: Message, context: Any, call_next: Any) -> Message:
        train = message.metadata.message_type == "train"
        return mod(message, context, call_next) if train else call_next(message, context)

    made, arrays = strategy(ask_nodes=True)
    made.start(Calls(of_ranks().app(mods=[at_training]), RANKS), arrays, num_rounds=1)

    assert [row.name for row in made.report.clients] == ["ann", "bob", "cy"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "fedprox"}, "fedprox"),
    ({"method": "ffa", "options": replace(DEFAULTS, quorum=0.5)}, "quorum: the rule of ffa"),
    ({"options": replace(DEFAULTS, energy=0.9), "method": "flora"}, "flora does not truncate"),
]


@pytest.mark.parametrize(("options", "line"), WRONG)
def test_a_wrong_option_ends_the_run_in_one_line(options: dict[str, Any], line: str) -> None:
    made, arrays = strategy(**options)
    with pytest.raises(AggregationError, match=line) as caught:
        made.start(Calls(of_ranks().app(), RANKS), arrays, num_rounds=1)
    assert "\n" not in str(caught.value)


def test_fedavg_checks_its_own_arguments() -> None:
    with pytest.raises(TypeError, match="fraction_fit"):
        strategy(fraction_fit=0.5)


def test_too_few_clients_for_a_robust_rule_do_not_end_a_run(lines: list[str]) -> None:
    ranks = dict.fromkeys("abcde", 4)
    grid = Calls(of_ranks(ranks).app(), ranks)
    options = replace(DEFAULTS, robust="multi-krum", attackers=1)
    made, arrays = strategy(options=options, min_train_nodes=5)
    made.start(grid, arrays, num_rounds=1)
    grid.lost = {101}
    made.start(grid, arrays, num_rounds=1)

    assert made.round == 1
    assert any("stays: attackers: 1 of 4 clients" in line for line in lines)


def test_a_client_that_does_not_fit_says_why() -> None:
    grid = Calls(of_ranks().app(), RANKS)
    made, arrays = strategy()
    made.start(grid, arrays, num_rounds=1)
    [message] = grid.of_type("train", "bob")

    with pytest.raises(InputError, match=r"k_proj.* has shape None, in the model"):
        load_adapter(peft_model(8, target_modules=["k_proj"]), message)


def test_arrays_of_another_strategy_load_if_the_rank_is_the_same() -> None:
    _, arrays = strategy()
    message = Message(RecordDict({"arrays": arrays}), 101, "train")
    model = peft_model(8)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.zero_()
    load_adapter(model, message)

    assert all(
        torch.equal(tensor, to_tensors(arrays)[name])
        for name, tensor in StateDict.of(model).tensors.items()
    )
    with pytest.raises(InputError, match=r"has shape \(8, 16\), in the model \(4, 16\)"):
        load_adapter(peft_model(4), message)
