"""Round 0: one start for all ranks, from the configuration of a base model alone."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import PREFIX, Spec, make
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_peft_models import bert, gpt2, llama, save, vit
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from typer.testing import CliRunner, Result

from fedlora_cli import (
    InitOptions,
    InputError,
    OutputError,
    UsageError,
    aggregate,
    initialise,
    read,
)
from fedlora_cli.cli import app
from fedlora_cli.libraries import hushed
from fedlora_cli.rounds.skeleton import make_skeleton

SAMPLES = Path(__file__).parents[1] / "samples"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

QV = InitOptions(ranks=(3,), target_modules=("q_proj", "v_proj"))


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def set_config(folder: Path, **fields: Any) -> None:
    """Change the configuration of a base model."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / WEIGHTS).items() if "lora_" in k}


def heads(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    return {k.removeprefix(PREFIX): v for k, v in tensors.items() if "lora_" not in k}


@pytest.fixture
def base(tmp_path: Path) -> Callable[[Callable[[], PreTrainedModel]], Path]:
    """Saves a tiny model, the same one whenever it is asked for."""

    def saved(build: Callable[[], PreTrainedModel]) -> Path:
        torch.manual_seed(11)
        with hushed():
            build().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return saved


Base = Callable[[Callable[[], PreTrainedModel]], Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], prog_name="fedlora")


def loaded(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter as a client loads it to train on; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True)


# What is written.


def test_every_rank_has_the_beginning_of_one_start(tmp_path: Path, base: Base) -> None:
    """Rank index i is the same direction for all; uniform in ±1/sqrt(in), and B is zero."""
    options = replace(QV, ranks=(2, 5, 9))

    report = initialise(base(llama), tmp_path / "out", options=options)

    assert [row.name for row in report.adapters] == ["rank-2", "rank-5", "rank-9"]
    widest = factors(tmp_path / "out/rank-9")
    assert len(widest) == 2 * 8
    rows = [tensor for key, tensor in widest.items() if "lora_A" in key]
    assert len({tensor[0, 0].item() for tensor in rows}) == len(rows)
    for rank in (2, 5, 9):
        for key, tensor in factors(tmp_path / f"out/rank-{rank}").items():
            if "lora_B" in key:
                assert tensor.shape[1] == rank
                assert not tensor.any()
            else:
                assert torch.equal(tensor, widest[key][:rank])
                bound = tensor.shape[1] ** -0.5
                assert 0.5 * bound < tensor.abs().max() <= bound
        written = config(tmp_path / f"out/rank-{rank}")
        assert (written["r"], written["lora_alpha"]) == (rank, 2 * rank)
        assert written["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("width", [8, 14])
def test_embeddings_start_as_peft_has_them_and_share_their_beginning_too(
    tmp_path: Path, base: Base, width: int
) -> None:
    """A is zero and B normal there: and torch draws the end of a whole normal matrix anew."""
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 1}
    tiny = LlamaConfig(vocab_size=29, num_hidden_layers=1, **sizes)
    options = InitOptions(ranks=(1, 3, 7), target_modules=("embed_tokens",))

    initialise(base(lambda: LlamaForCausalLM(tiny)), tmp_path / "out", options=options)

    B, A = (
        f"{PREFIX}model.embed_tokens.lora_embedding_B",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
    )
    widest = factors(tmp_path / "out/rank-7")[B]
    assert widest.shape == (width, 7)
    assert 0.6 < widest.std() < 1.4
    for rank in (1, 3, 7):
        tensors = factors(tmp_path / f"out/rank-{rank}")
        assert torch.equal(tensors[B], widest[:, :rank])
        assert tensors[A].shape == (rank, 29)
        assert not tensors[A].any()


def test_a_seed_makes_the_bytes_and_another_makes_others(tmp_path: Path, base: Base) -> None:
    home = base(vit)
    options = replace(QV, ranks=(2, 4), modules_to_save=("classifier",), num_labels=3)
    for name, one in (
        ("a", options),
        ("b", replace(options, jobs=1)),
        ("c", replace(options, seed=1)),
    ):
        initialise(home, tmp_path / name, options=one)

    for rank in ("rank-2", "rank-4"):
        a, b, c = (tmp_path / name / rank for name in "abc")
        assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()
        assert (a / CONFIG).read_bytes() == (b / CONFIG).read_bytes()
        assert heads(a).keys() == heads(c).keys() == {"classifier.weight", "classifier.bias"}
        assert not torch.equal(heads(a)["classifier.weight"], heads(c)["classifier.weight"])
        for key, tensor in factors(a).items():
            assert torch.equal(tensor, factors(c)[key]) == ("lora_B" in key)


@pytest.mark.parametrize(
    ("options", "alpha", "dropout", "dtype"),
    [
        ({}, 6, 0, torch.float32),
        ({"alpha": 7.5}, 7.5, 0, torch.float32),
        ({"scaling": 0.5, "dropout": 0.1}, 1.5, 0.1, torch.float32),
        ({"dtype": "bfloat16"}, 6, 0, torch.bfloat16),
    ],
)
def test_the_choices_of_training_are_written_down(
    tmp_path: Path, base: Base, options, alpha: float, dropout: float, dtype: torch.dtype
) -> None:
    chosen = replace(QV, task="CAUSAL_LM", revision="v2", **options)
    report = initialise(base(llama), tmp_path / "out", options=chosen)

    written = config(tmp_path / "out/rank-3")
    assert (written["lora_alpha"], written["lora_dropout"]) == (alpha, dropout)
    assert (written["task_type"], written["revision"]) == ("CAUSAL_LM", "v2")
    assert {tensor.dtype for tensor in factors(tmp_path / "out/rank-3").values()} == {dtype}
    assert (report.adapters[0].alpha, report.adapters[0].scaling) == (alpha, alpha / 3)
    assert report.adapters[0].bytes == (tmp_path / "out/rank-3" / WEIGHTS).stat().st_size


def test_like_clients_everyone_starts_at_its_own_ranks_and_alphas(
    tmp_path: Path, base: Base
) -> None:
    """Whatever they call the base model: rsLoRA, patterns, other modules, other dtypes."""
    q, v = (f"model.layers.1.self_attn.{one}" for one in ("q_proj", "v_proj"))
    shapes = {q: (32, 32), v: (16, 32)}
    specs = [
        Spec("ann", rank=2, alpha=9, shapes=shapes, ranks={v: 5}, alphas={q: 3}),
        Spec("bob", rank=6, rslora=True, shapes={q: shapes[q]}, dtype=torch.float16),
    ]
    clients = []
    for spec in specs:
        other = {"base_model_name_or_path": f"the base of {spec.name}", "lora_dropout": 0.2}
        clients.append(make(tmp_path / "clients", replace(spec, config=other)).folder)
    home = base(llama)

    report = initialise(home, tmp_path / "out", tmp_path / "clients")
    initialise(
        home, tmp_path / "scaled", clients, InitOptions(scaling=3, dropout=0, dtype="float32")
    )

    assert [row.name for row in report.adapters] == ["ann", "bob"]
    assert [(row.target, row.names) for row in report.targets] == [
        ("q_proj", (q,)),
        ("v_proj", (v,)),
    ]
    start = {**factors(tmp_path / "out/ann"), **factors(tmp_path / "scaled/bob")}
    for folder in clients:
        theirs, given = read(folder), read(tmp_path / "out" / folder.name)
        scaled = read(tmp_path / "scaled" / folder.name)
        assert given.modules.keys() == theirs.modules.keys()
        for name, module in theirs.modules.items():
            assert (given.modules[name].rank, given.modules[name].alpha) == (
                module.rank,
                module.alpha,
            )
            assert given.modules[name].dtype == module.dtype
            assert given.modules[name].scale == module.scale
            assert scaled.modules[name].scale == pytest.approx(3)
            assert scaled.modules[name].dtype == "float32"
        assert (given.facts.base_model, given.facts.dropout) == (str(home), 0.2)
        assert scaled.facts.dropout == 0
        for key, tensor in factors(folder).items():
            mine = factors(tmp_path / "scaled" / folder.name)[key]
            assert mine.shape == tensor.shape
            if "lora_A" in key:
                shared = min(len(mine), len(start[key]))
                assert torch.equal(mine[:shared], start[key][:shared])


# What is adapted.


@pytest.mark.parametrize(
    ("build", "options", "targets"),
    [
        (llama, {}, {("q_proj", (32, 32), 4), ("v_proj", (16, 32), 4)}),
        (gpt2, {}, {("c_attn", (72, 24), 2)}),
        (bert, {}, {("query", (32, 32), 2), ("value", (32, 32), 2)}),
        (
            gpt2,
            {"target_modules": "all-linear"},
            {
                ("c_attn", (72, 24), 2),
                ("c_proj", (24, 24), 2),
                ("c_fc", (96, 24), 2),
                ("c_proj", (24, 96), 2),
            },
        ),
        (
            vit,
            {"target_modules": "all-linear", "modules_to_save": ("classifier",)},
            {
                ("q_proj", (32, 32), 2),
                ("k_proj", (32, 32), 2),
                ("v_proj", (32, 32), 2),
                ("o_proj", (32, 32), 2),
                ("fc1", (40, 32), 2),
                ("fc2", (32, 40), 2),
            },
        ),
        (llama, {"target_modules": r".*\.[02]\..*down_proj"}, {("down_proj", (32, 56), 2)}),
    ],
)
def test_what_is_adapted_is_what_peft_adapts(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel], options, targets
) -> None:
    """By default what PEFT knows for the architecture."""
    report = initialise(base(build), tmp_path / "out", options=InitOptions((2,), **options))

    assert {(one.target, one.shape, len(one.names)) for one in report.targets} == targets
    names = {name for one in report.targets for name in one.names}
    assert set(read(tmp_path / "out/rank-2").modules) == names
    assert config(tmp_path / "out/rank-2")["fan_in_fan_out"] == (build is gpt2)


@pytest.mark.parametrize("build", [llama, gpt2, bert, vit])
def test_the_model_says_the_same_as_before_and_every_direction_can_be_trained(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel]
) -> None:
    home = base(build)
    targets = {vit: ("q_proj", "fc2"), llama: ("embed_tokens", "q_proj")}.get(build)
    saved = ("classifier",) if build in (vit, bert) else ()
    options = InitOptions((5,), target_modules=targets, modules_to_save=saved)
    initialise(home, tmp_path / "out", options=options)
    with hushed():
        model = type(build()).from_pretrained(home).eval()

    adapted = loaded(model, tmp_path / "out/rank-5")

    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    given = {"pixel_values": torch.randn(2, 3, 8, 8)} if build is vit else ids
    assert torch.equal(adapted.eval()(**given).logits, model(**given).logits)
    adapted.train()(**given).logits.square().sum().backward()
    tensors = {k: p for k, p in adapted.named_parameters() if "lora_" in k}
    assert len(tensors) == len(factors(tmp_path / "out/rank-5"))
    for name, parameter in tensors.items():
        # B is what moves first, and in an embedding, where B is not zero, A.
        if "lora_B" in name:
            assert parameter.grad.abs().amax(dim=0).min() > 0
        elif "embedding_A" in name:
            assert parameter.grad.abs().amax(dim=1).min() > 0


def test_a_first_round_of_training_goes_through(tmp_path: Path, base: Base) -> None:
    """Init, train with PEFT, save, aggregate: the ranks share one basis from the start."""
    options = replace(QV, ranks=(2, 6), modules_to_save=("classifier",))
    home = base(vit)
    initialise(home, tmp_path / "start", options=options)
    torch.manual_seed(2)
    for folder in sorted((tmp_path / "start").iterdir()):
        with hushed():
            model = loaded(type(vit()).from_pretrained(home), folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
        save(model, tmp_path / "trained" / folder.name)

    report = aggregate([tmp_path / "trained"], tmp_path / "global")

    assert [row.rank for row in report.clients] == [2, 6]
    assert report.energy_ratio is not None
    assert 0 < report.energy_ratio < 1


# Heads.


def test_a_head_is_the_base_models_own_and_equal_for_all(tmp_path: Path, base: Base) -> None:
    home = base(vit)
    options = replace(QV, ranks=(2, 4), modules_to_save=("classifier",))

    report = initialise(home, tmp_path / "out", options=options)

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
    with hushed():
        torch.manual_seed(11)
        vit().save_pretrained(home, max_shard_size="20KB")
    index = json.loads((home / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({index["classifier.weight"], *index.values()}) > 2
    # Only what is needed is opened.
    for shard in set(index.values()) - {index[f"classifier.{end}"] for end in ("weight", "bias")}:
        (home / shard).write_bytes(b"broken")

    initialise(home, tmp_path / "out", options=replace(QV, modules_to_save=("classifier",)))

    for name, tensor in heads(tmp_path / "out/rank-3").items():
        assert torch.equal(tensor, stored[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map in it"),
        (
            lambda index: index["weight_map"].update({"classifier.bias": "../secret.safetensors"}),
            "weight_map names '../secret.safetensors'; it must name files beside it",
        ),
        (
            lambda index: index["weight_map"].update({"classifier.bias": "gone.safetensors"}),
            "it names gone.safetensors, which is not there",
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
        initialise(home, tmp_path / "out", options=replace(QV, modules_to_save=("classifier",)))


def test_a_damaged_head_is_refused_and_other_tensors_are_nobodys_business(
    tmp_path: Path, base: Base
) -> None:
    home = base(vit)
    options = replace(QV, modules_to_save=("classifier",))
    path = home / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if not key.startswith("classifier"))
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, path)
    initialise(home, tmp_path / "out", options=options)
    save_file(tensors | {"classifier.bias": torch.zeros(5).to(torch.float8_e4m3fn)}, path)

    with pytest.raises(InputError, match=r"classifier\.bias has dtype F8_E4M3"):
        initialise(home, tmp_path / "again", options=options)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_task_adds_its_head_drawn_alike_for_all(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel]
) -> None:
    home = base(build)
    options = InitOptions(ranks=(2, 4), task="SEQ_CLS", num_labels=7)

    report = initialise(home, tmp_path / "out", options=options)

    said = "the base model has no score of this shape: drawn at random"
    assert report.warnings == (said,)
    one, other = (heads(tmp_path / f"out/rank-{rank}") for rank in (2, 4))
    assert one.keys() == {"score.weight"}
    assert torch.equal(one["score.weight"], other["score.weight"])
    assert one["score.weight"].shape[0] == 7
    assert 0.01 < one["score.weight"].std() < 0.03  # initializer_range is 0.02
    with hushed():
        model = AutoModelForSequenceClassification.from_pretrained(home, num_labels=7)
    model = loaded(model, tmp_path / "out/rank-2")
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert torch.equal(
        model.state_dict()["base_model.model.score.modules_to_save.default.weight"],
        one["score.weight"],
    )


def test_a_head_of_another_size_is_drawn_whole(tmp_path: Path, base: Base) -> None:
    options = InitOptions(ranks=(2,), task="SEQ_CLS", num_labels=9)

    report = initialise(base(bert), tmp_path / "out", options=options)

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

    report = initialise(home, tmp_path / "out", options=options)

    stored = load_file(home / "model.safetensors")
    key = "transformer.wte.weight" if build is gpt2 else "lm_head.weight"
    assert torch.equal(heads(tmp_path / "out/rank-2")["lm_head.weight"], stored[key])
    assert report.warnings == ()


def test_a_base_model_that_was_saved_without_its_head_is_understood(
    tmp_path: Path, base: Base
) -> None:
    home = base(lambda: llama().model)
    options = replace(QV, task="CAUSAL_LM", modules_to_save=("embed_tokens",))

    initialise(home, tmp_path / "out", options=options)

    stored = load_file(home / "model.safetensors")
    own = heads(tmp_path / "out/rank-3")
    assert torch.equal(own["model.embed_tokens.weight"], stored["embed_tokens.weight"])


def test_a_pickle_is_refused_where_a_head_is_needed_and_only_there(
    tmp_path: Path, base: Base
) -> None:
    home = base(vit)
    (home / "model.safetensors").rename(home / "pytorch_model.bin")

    initialise(home, tmp_path / "out", options=QV)
    with pytest.raises(InputError, match=r"in pytorch_model\.bin, a pickle, which is never opened"):
        initialise(home, tmp_path / "no", options=replace(QV, modules_to_save=("classifier",)))
    assert not (tmp_path / "no").exists()


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
    assert "some/tiny: no model.safetensors that can be had; download the mode" in refused.stderr
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

    initialise(home, tmp_path / "out", tmp_path / "clients")

    stored = load_file(home / "model.safetensors")
    own = heads(tmp_path / "out/ann")
    assert own.keys() == head.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in own.items())
    assert heads(tmp_path / "out/bob") == {}


# Large models, and strange ones.


def test_a_model_of_seventy_billion_parameters_is_never_allocated(tmp_path: Path) -> None:
    home = tmp_path / "large"
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(home)

    with hushed():
        skeleton = make_skeleton(str(home), None, "CAUSAL_LM", None, (), None)
    report = initialise(home, tmp_path / "out", options=InitOptions(ranks=(1,), task="CAUSAL_LM"))

    state = [*skeleton.model.parameters(), *skeleton.model.buffers()]
    assert sum(map(torch.Tensor.numel, state)) > 70e9
    assert {tensor.device.type for tensor in state} == {"meta"}
    assert {(one.target, one.shape, len(one.names)) for one in report.targets} == {
        ("q_proj", (8192, 8192), 80),
        ("v_proj", (1024, 8192), 80),
    }
    assert report.adapters[0].parameters == 80 * (8192 + 8192 + 1024 + 8192)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, base: Base, monkeypatch) -> None:
    """Nor does anybody ask whether it should be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    home = base(llama)
    ran = tmp_path / "ran"
    (home / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    set_config(home, auto_map=classes)
    initialise(home, tmp_path / "one", options=replace(QV, task="CAUSAL_LM"))
    set_config(home, auto_map={"AutoModelForSeq2SeqLM": "theirs.Model"})
    with pytest.raises(InputError, match="AutoModelForSeq2SeqLM cannot be made of its config"):
        initialise(home, tmp_path / "two", options=replace(QV, task="SEQ_2_SEQ_LM"))
    set_config(home, auto_map=classes, model_type="theirs")
    with pytest.raises(InputError, match="its configuration cannot be read"):
        initialise(home, tmp_path / "three", options=replace(QV, task="CAUSAL_LM"))

    assert (tmp_path / "one").exists()
    assert not ran.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": None}, "it does not say from which class it was saved; give --task"),
        ({"architectures": ["Trainer"]}, "from Trainer, which is no model of transformers"),
        ({"architectures": ["pipeline"]}, "from pipeline, which is no model of transformers"),
        ({"architectures": ["NoSuchModel"]}, "from NoSuchModel, which is no model of transf"),
        ({"architectures": ["BertModel"]}, "BertModel cannot be made of its configuration"),
        ({"num_attention_heads": 0}, "its configuration cannot be read"),
        ({"hidden_size": -4}, "cannot be made of its configuration"),
        ({"hidden_size": "wide"}, "its configuration cannot be read"),
        ({"model_type": "no such type"}, "its configuration cannot be read"),
    ],
)
def test_a_strange_configuration_is_one_line_and_exit_code_3(
    tmp_path: Path, base: Base, fields, message: str
) -> None:
    home = base(llama)
    set_config(home, **fields)

    result = run(home, "-o", tmp_path / "out", "--ranks", "2")

    assert (result.exit_code, result.stdout) == (3, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


# What goes wrong.


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--like: neither it nor --ranks is given; give one of them"),
        (["--ranks", "2", "--like", "clients"], 2, "--like: given with --ranks"),
        (["--ranks", "2,x"], 2, "--ranks: 'x' is no number"),
        (["--ranks", "0"], 2, "--ranks: 0 is out of range"),
        (["--ranks", "33"], 2, "--ranks: 33, where no module has more than 32 directions"),
        (["--ranks", "2", "--alpha", "4", "--scaling", "2"], 2, "--scaling: given together with"),
        (["--ranks", "2", "--alpha", "-4"], 2, "--alpha: -4.0 is out of range"),
        (["--ranks", "2", "--scaling", "1e12"], 2, "--alpha: 2e+12 in rank-2"),
        (["--ranks", "2", "--task", "CHAT"], 2, "--task: no task CHAT; use one of CAUSAL_LM"),
        (["--ranks", "2", "--num-labels", "0"], 2, "--num-labels: 0 is out of range"),
        (["--ranks", "2", "--num-labels", "3"], 2, "--num-labels: no head is trained in full"),
        (["--ranks", "2", "--seed", "-1"], 2, "--seed: -1 is out of range"),
        (["--ranks", "2", "--dropout", "1"], 2, "--dropout: 1.0 is out of range"),
        (["--ranks", "2", "--target-modules", "typo"], 2, "typo; name some of embed_tokens, q_"),
        (["--ranks", "2", "--target-modules", "q_proj,typo"], 2, "no module is named typo; name"),
        (["--ranks", "2", "--target-modules", "q_proj,,"], 2, "'q_proj,,' has an empty name"),
        (["--ranks", "2", "--target-modules", "norm"], 2, "--target-modules: "),
        (
            ["--ranks", "2", "--modules-to-save", "typo"],
            2,
            "no module is named typo; the outermost are model",
        ),
        (["--ranks", "2", "--task", "SEQ_2_SEQ_LM"], 3, "AutoModelForSeq2SeqLM cannot be made"),
        (["--like", "clients", "--target-modules", "q_proj"], 2, "given with --like; the clients"),
        (["--like", "clients", "--modules-to-save", "x"], 2, "given with --like; the clients"),
        (["--like", "clients"], 3, "no module is named layers.0.q_proj; give the base model of"),
        (["--like", "other"], 3, "is 4 x 4 there, and 32 x 32 in base; give the base model of"),
        (["--like", "nothing"], 3, "nothing: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    tmp_path: Path, base: Base, monkeypatch, arguments: list[str], code: int, message: str
) -> None:
    base(llama)
    make(tmp_path / "clients", Spec("ann", rank=2))
    shapes = {"model.layers.0.self_attn.q_proj": (4, 4)}
    make(tmp_path / "other", Spec("ann", rank=2, shapes=shapes))
    monkeypatch.chdir(tmp_path)

    result = run("base", "-o", "out", *arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "clients", "other"]


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "no/such/base", "nobody/nothing"])
def test_a_base_model_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)

    result = run(name, "-o", "out", "--ranks", "2")

    assert result.exit_code == 3
    assert f"{name}: no such folder, and no model that can be had" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_without_a_configuration_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()

    result = run("empty", "-o", "out", "--ranks", "2")

    assert result.exit_code == 3
    assert "empty: its configuration cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_expression_that_is_none_is_refused(tmp_path: Path, base: Base) -> None:
    options = InitOptions(ranks=(2,), target_modules="(((")

    with pytest.raises(UsageError, match=r"--target-modules: .* name some of embed_tokens, q_proj"):
        initialise(base(llama), tmp_path / "out", options=options)


def test_convolutions_are_refused(tmp_path: Path, base: Base) -> None:
    options = InitOptions(ranks=(2,), target_modules=("projection",))

    with pytest.raises(UsageError, match="projection is a convolution; not understood yet"):
        initialise(base(vit), tmp_path / "out", options=options)


def test_an_architecture_that_peft_does_not_know_asks_for_names(tmp_path: Path, base: Base) -> None:
    found = "PEFT has no default for ViTForImageClassification; name some of q_proj, .* all-linear"
    with pytest.raises(UsageError, match=found):
        initialise(base(vit), tmp_path / "out", options=InitOptions(ranks=(2,)))


@pytest.mark.parametrize("place", ["base", "base/out", "clients", "clients/ann/out", "."])
def test_output_inside_or_around_the_input_is_refused(
    tmp_path: Path, base: Base, place: str
) -> None:
    home = base(vit)
    shapes = {"vit.layers.0.attention.q_proj": (32, 32)}
    make(tmp_path / "clients", Spec("ann", rank=2, shapes=shapes))

    with pytest.raises(InputError, match="the output would stand inside the input"):
        initialise(home, tmp_path / place, tmp_path / "clients", InitOptions(force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "clients"]


def test_nothing_is_left_behind_on_failure_and_force_replaces_adapters_only(
    tmp_path: Path, base: Base, monkeypatch
) -> None:
    from fedlora_cli.rounds import initialise as workflow

    home = base(llama)
    three = replace(QV, ranks=(2, 3, 4), jobs=1)
    initialise(home, tmp_path / "out", options=three)
    with pytest.raises(OutputError, match="give --force"):
        initialise(home, tmp_path / "out", options=three)

    def failing(skeleton: Any, seed: int, name: str, rank: int, scale: float) -> Any:
        if rank == 4:
            raise InputError(name, "broken", "mend it")
        return start(skeleton, seed, name, rank, scale)

    start = workflow._start
    monkeypatch.setattr(workflow, "_start", failing)
    with pytest.raises(InputError, match="broken"):
        initialise(home, tmp_path / "out", options=replace(three, force=True, seed=5))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    before = (tmp_path / "out/rank-2" / WEIGHTS).read_bytes()
    (tmp_path / "out/rank-3/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds rank-3/mine\.txt"):
        initialise(home, tmp_path / "out", options=replace(three, force=True))
    assert (tmp_path / "out/rank-2" / WEIGHTS).read_bytes() == before
    (tmp_path / "out/rank-3/mine.txt").unlink()
    initialise(home, tmp_path / "out", options=replace(QV, force=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rank-3"]


# The command.


def test_the_command_shows_what_is_adapted_and_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--target-modules", "q_proj,fc1", "--modules-to-save", "classifier"]
    result = run(SAMPLES / "base", "-o", "start", "--ranks", "2,8", "--ranks", "4", *arguments)

    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted((tmp_path / "start").iterdir())] == [
        "rank-2", "rank-4", "rank-8",
    ]  # fmt: skip
    headline = " ".join(result.stdout.split())  # broken where the path of the samples is long
    assert "ViTForImageClassification, 6 modules, seed 0" in headline
    for row in ("q_proj        3  48 x 48", "fc1           3  96 x 48", "from the base model"):
        assert row in result.stdout
    table = result.stdout.split("target", 1)[1]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert result.stderr == (
        "wrote: start\nnext: train from these; then fedlora aggregate CLIENTS -o global\n"
    )
    for line in run(
        SAMPLES / "base", "-o", "all", "--ranks", "2", "--target-modules", "all-linear", "-v"
    ).stdout.splitlines():
        assert "and 1 more" not in line


def test_the_start_like_the_sample_round(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(SAMPLES.parent)
    result = run("samples/base", "-o", tmp_path / "start", "--like", "samples/round-01")

    assert result.exit_code == 0, result.output
    for folder in (SAMPLES / "round-01").iterdir():
        given = read(tmp_path / "start" / folder.name)
        assert given.rank == read(folder).rank
        assert given.tensors.keys() == read(folder).tensors.keys()


def test_quiet_says_nothing_and_json_is_one_document(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = (SAMPLES / "base", "--ranks", "2", "--target-modules", "q_proj")
    assert run(*command, "-o", "quiet", "-q").output == ""
    result = run(*command, "-o", "start", "--json")

    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document["schema"] == "fedlora.init/1"
    assert (document["output"], document["seed"]) == ("start", 0)
    assert [row["path"] for row in document["adapters"]] == ["start/rank-2"]
    assert document["targets"][0]["shape"] == [48, 48]


def test_the_libraries_that_are_used_say_nothing_and_are_as_before(
    tmp_path: Path, base: Base
) -> None:
    home = base(gpt2)
    program = (
        "import fedlora_cli, warnings\n"
        "from transformers.utils import logging\n"
        "before = logging.get_verbosity(), logging.is_progress_bar_enabled()\n"
        "options = fedlora_cli.InitOptions(ranks=(2,), task='SEQ_CLS')\n"
        f"fedlora_cli.initialise({str(home)!r}, {str(tmp_path / 'out')!r}, options=options)\n"
        "assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_rank_index_i_has_one_meaning_for_a_mean_of_different_ranks(
    tmp_path: Path, base: Base
) -> None:
    """What raFLoRA needs: zero-padded, the A of all ranks have one mean of full length."""
    initialise(base(llama), tmp_path / "out", options=replace(QV, ranks=(2, 4)))

    low, high = (factors(tmp_path / f"out/rank-{rank}") for rank in (2, 4))
    for key in (key for key in high if "lora_A" in key):
        cosine = np.vdot(low[key].numpy(), high[key][:2].numpy()) / low[key].square().sum().item()
        assert math.isclose(cosine, 1, abs_tol=1e-6)
