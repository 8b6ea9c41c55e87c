"""The global adapter at every client's rank: what PEFT makes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import PREFIX, WEIGHTS, relative_error, truncated
from support.distribution import dense
from support.models import CASES, adapted, delta_of, factors_of, save, train
from support.starts import loaded
from transformers import PreTrainedModel

from fedlora_cli import AggregateOptions, DistributeOptions, aggregate, distribute


def inputs(name: str, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4)}
    ids = torch.arange(2 * 9).reshape(2, 9)
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if name == "bert" else ids}


def gradients(layer: Any) -> torch.Tensor:
    """For every direction of a layer, the largest gradient of B's column and A's row."""
    if "default" in layer.lora_A:
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    else:
        B, A = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
    return A.grad.abs().amax(dim=1) + B.grad.abs().amax(dim=0)


@pytest.mark.parametrize("name", CASES)
def test_peft_trains_on_from_exactly_the_truncated_update(tmp_path: Path, name: str) -> None:
    """Every architecture: Conv1D, embeddings, rsLoRA, patterns, heads; and a rank above all."""
    case = CASES[name]
    torch.manual_seed(99)
    base = case.build()
    clients = train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global", AggregateOptions(method="flexlora"))
    heads = {k: v for k, v in load_file(tmp_path / "global" / WEIGHTS).items() if "lora_" not in k}
    update = dense(tmp_path / "global")

    distribute(tmp_path / "global", tmp_path / "out", tmp_path / "round")
    distribute(tmp_path / "global", tmp_path / "ranks", options=DistributeOptions(ranks=(20,)))

    expected_ranks = {
        client.folder.name: {m: A.shape[0] for m, (_, A, _) in client.factors.items()}
        for client in clients
    }
    folders = [*(tmp_path / "out" / one for one in expected_ranks), tmp_path / "ranks/rank-20"]
    for folder in folders:
        model = loaded(base, folder)
        ranks = expected_ranks.get(folder.name) or dict.fromkeys(update, 20)
        layers = adapted(model)
        assert set(layers) == set(ranks)
        for module, rank in ranks.items():
            B, _, _ = factors_of(layers[module])
            assert B.shape[1] == rank
            expected = truncated(update[module], rank)
            assert relative_error(delta_of(layers[module]), expected) < 1e-5
        if folder.name in expected_ranks:
            theirs = {one.folder.name: one for one in clients}[folder.name]
            for module, (_, _, scale) in theirs.factors.items():
                assert factors_of(layers[module])[2] == pytest.approx(scale)
        own = load_file(folder / WEIGHTS)
        for key in (key for key in heads if key in own):
            assert torch.equal(own[key], heads[key])
        model(**inputs(name, base)).loss.backward()
        # An embedding learns only of the tokens that it has seen, all the others of everything.
        for layer in layers.values():
            assert gradients(layer).min() > 0


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_the_forward_pass_is_that_of_the_dense_weights(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(5)
    base = case.build().eval()
    train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global")
    distribute(tmp_path / "global", tmp_path / "out", options=DistributeOptions(ranks=(3,)))

    model = loaded(base, tmp_path / "out/rank-3").eval()
    reference = copy.deepcopy(base)
    tensors = load_file(tmp_path / "out/rank-3" / WEIGHTS)
    with torch.no_grad():
        for module, update in dense(tmp_path / "global").items():
            weight = reference.get_submodule(module).weight
            delta = torch.from_numpy(truncated(update, 3)).float()
            weight += delta.T if module.endswith("embed_tokens") else delta
        for key, tensor in tensors.items():
            if "lora_" not in key and "classifier" in key:
                reference.get_parameter(key.removeprefix(PREFIX)).copy_(tensor)
        given = inputs(name, base)
        torch.testing.assert_close(model(**given).logits, reference(**given).logits)


def test_a_round_of_training_goes_on_from_what_was_handed_out(tmp_path: Path) -> None:
    """Aggregate, distribute, train with PEFT, save, aggregate again."""
    case = CASES["vit"]
    torch.manual_seed(1)
    base = case.build()
    train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global")
    distribute(tmp_path / "global", tmp_path / "start", tmp_path / "round")

    before = {}
    for folder in sorted((tmp_path / "start").iterdir()):
        model = loaded(base, folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs("vit", base)).loss.backward()
            optimizer.step()
        save(model, tmp_path / "trained" / folder.name)
        before[folder.name] = dense(folder)
    options = AggregateOptions(previous=tmp_path / "global", verify=True)
    report = aggregate([tmp_path / "trained"], tmp_path / "next", options)

    assert [row.rank for row in report.clients] == [2, 6]
    for name, updates in before.items():
        after = dense(tmp_path / "trained" / name)
        assert set(after) == set(updates)
        assert all(relative_error(after[module], updates[module]) > 1e-3 for module in updates)
