"""Round 0: heads that are trained in full, from the weights of the base model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import Spec, config, make
from support.models import bert, gpt2, llama, vit
from support.starts import QV, Base, heads, loaded, save_base
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fedlora_cli import InitOptions, InputError, initialize
from fedlora_cli.libraries import muted


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return partial(save_base, tmp_path / "base")


def test_a_head_is_the_base_models_own_and_equal_for_all(tmp_path: Path, base: Base) -> None:
    home = base(vit)
    options = replace(QV, ranks=(2, 4), modules_to_save=("classifier",))

    report = initialize(home, tmp_path / "out", options=options)

    stored = load_file(home / "model.safetensors")
    for rank in (2, 4):
        own = heads(tmp_path / f"out/rank-{rank}")
        assert own.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, stored[name]) for name, tensor in own.items())
        assert config(tmp_path / f"out/rank-{rank}")["modules_to_save"] == ["classifier"]
    assert [(row.name, row.shape, row.drawn) for row in report.tensors] == [
        ("classifier.bias", (5,), False),
        ("classifier.weight", (5, 32), False),
    ]
    assert report.warnings == ()


def test_a_sharded_base_model_is_read_by_its_index(tmp_path: Path, base: Base) -> None:
    home = base(vit)
    stored = load_file(home / "model.safetensors")
    (home / "model.safetensors").unlink()
    with muted():
        torch.manual_seed(11)
        vit().save_pretrained(home, max_shard_size="20KB")
    index = json.loads((home / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({index["classifier.weight"], *index.values()}) > 2
    # Only what is needed is opened.
    for shard in set(index.values()) - {index[f"classifier.{end}"] for end in ("weight", "bias")}:
        (home / shard).write_bytes(b"broken")

    initialize(home, tmp_path / "out", options=replace(QV, modules_to_save=("classifier",)))

    for name, tensor in heads(tmp_path / "out/rank-3").items():
        assert torch.equal(tensor, stored[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map in it"),
        (
            lambda index: index["weight_map"].update({"classifier.bias": "../secret.safetensors"}),
            "weight_map names '../secret.safetensors'; it must name files in the same folder",
        ),
        (
            lambda index: index["weight_map"].update({"classifier.bias": "gone.safetensors"}),
            "it names the missing file gone.safetensors",
        ),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, base: Base, change, message: str) -> None:
    home = base(vit)
    stored = load_file(home / "model.safetensors")
    (home / "model.safetensors").rename(home / "one.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "one.safetensors")}
    change(index)
    (home / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InputError, match=message):
        initialize(home, tmp_path / "out", options=replace(QV, modules_to_save=("classifier",)))


def test_a_damaged_head_is_refused_and_other_tensors_are_nobodys_business(
    tmp_path: Path, base: Base
) -> None:
    home = base(vit)
    options = replace(QV, modules_to_save=("classifier",))
    path = home / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if not key.startswith("classifier"))
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, path)
    initialize(home, tmp_path / "out", options=options)
    save_file(tensors | {"classifier.bias": torch.zeros(5).to(torch.float8_e4m3fn)}, path)

    with pytest.raises(InputError, match=r"classifier\.bias has dtype F8_E4M3"):
        initialize(home, tmp_path / "again", options=options)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_task_adds_its_head_drawn_alike_for_all(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel]
) -> None:
    home = base(build)
    options = InitOptions(ranks=(2, 4), task="SEQ_CLS", num_labels=7)

    report = initialize(home, tmp_path / "out", options=options)

    said = "the base model has no score of this shape: drawn at random"
    assert report.warnings == (said,)
    one, other = (heads(tmp_path / f"out/rank-{rank}") for rank in (2, 4))
    assert one.keys() == {"score.weight"}
    assert torch.equal(one["score.weight"], other["score.weight"])
    assert one["score.weight"].shape[0] == 7
    assert 0.01 < one["score.weight"].std() < 0.03  # initializer_range is 0.02
    with muted():
        model = AutoModelForSequenceClassification.from_pretrained(home, num_labels=7)
    model = loaded(model, tmp_path / "out/rank-2")
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert torch.equal(
        model.state_dict()["base_model.model.score.modules_to_save.default.weight"],
        one["score.weight"],
    )


def test_a_head_of_another_size_is_drawn_whole(tmp_path: Path, base: Base) -> None:
    options = InitOptions(ranks=(2,), task="SEQ_CLS", num_labels=9)

    report = initialize(base(bert), tmp_path / "out", options=options)

    own = heads(tmp_path / "out/rank-2")
    assert own["classifier.weight"].shape == (9, 32)
    assert not own["classifier.bias"].any()
    assert all(row.drawn for row in report.tensors)


def test_what_no_layer_draws_is_zero_and_never_old_memory() -> None:
    from fedlora_cli.rounds.heads import _drawn

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.empty(3, device="meta"))
            self.norm = torch.nn.LayerNorm(3, device="meta")

        def to_empty(self, **_: Any) -> Head:
            self.scale = torch.nn.Parameter(torch.full((3,), float("nan")))
            self.norm.to_empty(device="cpu")
            return self

    class Model:
        def get_submodule(self, name: str) -> Head:
            return Head()

        def _init_weights(self, module: torch.nn.Module) -> None:
            """Knows none of them."""

    drawn = _drawn(Model(), "head", 0)

    assert torch.equal(drawn["head.scale"], torch.zeros(3))
    assert torch.equal(drawn["head.norm.weight"], torch.ones(3))


@pytest.mark.parametrize("build", [gpt2, llama])
def test_an_output_layer_that_is_tied_to_the_embeddings_is_read_from_them(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel]
) -> None:
    """GPT-2's is; that of this Llama is its own."""
    home = base(build)
    options = InitOptions(ranks=(2,), modules_to_save=("lm_head",))

    report = initialize(home, tmp_path / "out", options=options)

    stored = load_file(home / "model.safetensors")
    key = "transformer.wte.weight" if build is gpt2 else "lm_head.weight"
    assert torch.equal(heads(tmp_path / "out/rank-2")["lm_head.weight"], stored[key])
    assert report.warnings == ()


def test_a_base_model_that_was_saved_without_its_head_is_understood(
    tmp_path: Path, base: Base
) -> None:
    home = base(lambda: llama().model)
    options = replace(QV, task="CAUSAL_LM", modules_to_save=("embed_tokens",))

    initialize(home, tmp_path / "out", options=options)

    stored = load_file(home / "model.safetensors")
    own = heads(tmp_path / "out/rank-3")
    assert torch.equal(own["model.embed_tokens.weight"], stored["embed_tokens.weight"])


def test_a_pickle_is_refused_where_a_head_is_needed_and_only_there(
    tmp_path: Path, base: Base
) -> None:
    home = base(vit)
    (home / "model.safetensors").rename(home / "pytorch_model.bin")

    initialize(home, tmp_path / "out", options=QV)
    with pytest.raises(
        InputError, match=r"in pytorch_model\.bin, a pickle, which fedlora never opens"
    ):
        initialize(home, tmp_path / "no", options=replace(QV, modules_to_save=("classifier",)))
    assert not (tmp_path / "no").exists()


@pytest.mark.long
def test_a_model_of_the_hub_is_read_where_it_was_downloaded(tmp_path: Path, base: Base) -> None:
    """Offline, from the hub's own folders; a head is never drawn because nothing was downloaded."""
    home = base(vit)
    cache = tmp_path / "hub/models--some--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0" * 40)
    shutil.copy(home / "config.json", snapshot)
    arguments = ("--ranks", "2", "--target-modules", "q_proj", "--modules-to-save", "classifier")

    def run_apart(output: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own: the hub looks once where its folders are."""
        return subprocess.run(
            [sys.executable, "-m", "fedlora_cli", "init", "some/tiny", "-o", output, *arguments],
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    refused = run_apart("never")
    shutil.copy(home / "model.safetensors", snapshot)
    done = run_apart("out")

    assert refused.returncode == 3
    assert "some/tiny: model.safetensors cannot be downloaded; download the mode" in refused.stderr
    assert not (tmp_path / "never").exists()
    assert done.returncode == 0, done.stderr
    stored = load_file(home / "model.safetensors")
    own = heads(tmp_path / "out/rank-2")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in own.items())
    assert config(tmp_path / "out/rank-2")["base_model_name_or_path"] == "some/tiny"


def test_clients_that_train_a_head_get_the_base_models(tmp_path: Path, base: Base) -> None:
    shapes = {"vit.layers.0.attention.q_proj": (32, 32)}
    head = {"classifier.weight": torch.zeros(5, 32), "classifier.bias": torch.zeros(5)}
    saved = {"modules_to_save": ["classifier"]}
    make(tmp_path / "clients", Spec("ann", 2, shapes=shapes, tensors=head, config=saved))
    make(tmp_path / "clients", Spec("bob", 3, shapes=shapes))
    home = base(vit)

    initialize(home, tmp_path / "out", tmp_path / "clients")

    stored = load_file(home / "model.safetensors")
    own = heads(tmp_path / "out/ann")
    assert own.keys() == head.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in own.items())
    assert heads(tmp_path / "out/bob") == {}
