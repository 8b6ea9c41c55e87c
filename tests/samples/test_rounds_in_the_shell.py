"""Federated rounds as a user runs them: the sample script, and its client on other models."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import PREFIX, relative_error, truncated, written_update
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
)

from fedlora_cli import InitOptions, initialize, read

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
WEIGHTS = "adapter_model.safetensors"
RANKS = {"clinic-a": 4, "clinic-c": 2, "clinic-f": 16, "clinic-g": 8}
LOSSES = re.compile(r"^(\S+): (\d+) samples, loss (\S+) -> (\S+)$", re.M)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The client's command, in this process."""
    monkeypatch.syspath_prepend(SAMPLES)
    from train_client import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for a second one
    yield lambda *arguments: main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def accuracy(data: Path, adapter: Path | None) -> float:
    """Of the sample base model with this adapter, on these digits."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    images = torch.tensor([row["pixel_values"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    model: Any = ViTForImageClassification.from_pretrained(SAMPLES / "base")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return float((model.eval()(images).logits.argmax(1) == labels).float().mean())


@pytest.mark.long
def test_the_script_runs_two_rounds_from_any_folder(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(SAMPLES / "federated_rounds.sh"), "2", "some rounds"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    home = tmp_path / "some rounds"
    first, second = home / "round-01", home / "round-02"

    assert done.returncode == 0, done.stderr
    assert re.search(r"^rounds: 2 of raflora, rank 16", done.stdout, re.M)
    assert re.search(r"^verdict: \w+", done.stdout, re.M)
    assert sorted(path.name for path in home.glob("round-*")) == ["round-01", "round-02"]

    # Every client starts from the beginning of one adapter that changes nothing.
    largest = load_file(first / "start/clinic-f" / WEIGHTS)
    for client, rank in RANKS.items():
        for name, tensor in load_file(first / "start" / client / WEIGHTS).items():
            if "lora_A" in name:
                assert torch.equal(tensor, largest[name][:rank])
            elif "lora_B" in name:
                assert not tensor.any()

    # Every client trains on its own data, in both rounds, and tells how much it has.
    told = LOSSES.findall(done.stdout)
    assert sorted(name for name, *_ in told) == sorted([*RANKS, *RANKS])
    assert all(float(after) < float(before) for _, _, before, after in told)
    for folder in (first, second):
        report = json.loads((folder / "global/fedlora.json").read_text())
        assert {row["name"]: row["rank"] for row in report["clients"]} == RANKS
        for row in report["clients"]:
            lines = (home / f"data/{row['name']}.jsonl").read_text().splitlines()
            assert row["samples"] == len(lines)
    assert report["options"]["--previous"] == "round-01/global"

    # Between the rounds, everybody receives the first global adapter at their own rank.
    whole = load_file(first / "global" / WEIGHTS)
    assert config(first / "global")["target_modules"] == ["fc1", "fc2", "q_proj", "v_proj"]
    report = json.loads((first / "global/fedlora.json").read_text())
    modules = [row["name"] for row in report["modules"]]
    assert len(modules) == 12
    for client, rank in RANKS.items():
        start = second / "start" / client
        assert config(start)["r"] == rank
        for module in modules:
            expected = truncated(written_update(first / "global", module), rank)
            assert relative_error(written_update(start, module), expected) < 1e-6
        for name in ("classifier.weight", "classifier.bias"):
            key = PREFIX + name
            assert torch.equal(load_file(start / WEIGHTS)[key], whole[key])

    # And what they made together knows more digits than the base model.
    test = home / "data/test.jsonl"
    assert accuracy(test, None) < 0.5
    assert accuracy(test, second / "global") > 0.75


WORDS = [
    *"ABCD",
    "plus",
    "is",
    "red",
    "green",
    "blue",
    "sea",
    "sky",
    "fire",
    "grass",
    "good",
    "bad",
]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # the usual 0.02 is for far wider layers
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; 1 stands for all other words and 2 ends a text."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    vocabulary = {word: index for index, word in enumerate([*special.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def bert() -> PreTrainedModel:
    """A body alone: the head comes with the adapter."""
    return BertModel(BertConfig(**SIZES, vocab_size=20, max_position_embeddings=12))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=20, max_position_embeddings=12))


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 20}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))


def base_model(folder: Path, build: Callable[[], PreTrainedModel]) -> Path:
    """A tiny model and its tokenizer on disk."""
    torch.manual_seed(0)
    build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def started(folder: Path, build: Callable[[], PreTrainedModel], **options: Any) -> Path:
    """An initial adapter of rank 4, as `fedlora init` writes it."""
    base = base_model(folder / "base", build)
    initialize(base, folder / "start", options=InitOptions(ranks=(4,), **options))
    return folder / "start/rank-4"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


#: Texts of different lengths, one of them longer than the models take.
COLOURS = [("sea", "blue"), ("fire", "red"), ("grass", "green"), ("sky", "blue")]
CLASSES = [
    {"text": f"{thing} " * (14 if thing == "sky" else 1) + f"is {colour}", "label": label}
    for label, colour in enumerate(["red", "green", "blue"])
    for thing, right in COLOURS
    if colour == right
]
ANSWERS = [{"prompt": f"{thing} is", "completion": colour} for thing, colour in COLOURS]
TEXTS = [{"text": " ".join([thing, "is", *[colour] * n])} for n, (thing, colour) in
         enumerate(COLOURS, 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "options", "extra", "name", "rows"),
    [
        (bert, {"task": "SEQ_CLS", "num_labels": 3}, ["--num-labels", 3], "own.csv", CLASSES),
        (llama, {"task": "CAUSAL_LM"}, [], "own.jsonl", ANSWERS),
        (gpt2, {}, [], "own.jsonl", TEXTS),  # of the class that the base names
    ],
    ids=["bert", "llama", "gpt2"],
)
def test_a_client_learns_its_own_texts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train: Callable[..., None],
    build: Callable[[], PreTrainedModel],
    options: dict[str, Any],
    extra: list[Any],
    name: str,
    rows: list[dict[str, Any]],
) -> None:
    start = started(tmp_path, build, **options)
    own = written(tmp_path / name, rows)
    choices = ["--epochs", 25, "--lr", 2e-2, "--batch-size", 3, *extra]
    train(start, own, "-o", tmp_path / "clients/ann", *choices)
    train(start, own, "-o", tmp_path / "again", *choices)
    first, second = LOSSES.findall(capsys.readouterr().out)

    assert first[:2] == ("ann", "4")
    assert float(first[3]) < 0.6 * float(first[2])
    assert first[2:] == second[2:]
    assert json.loads((tmp_path / "clients/ann/fedlora.json").read_text()) == {"samples": 4}
    before, after = (load_file(folder / WEIGHTS) for folder in (start, tmp_path / "clients/ann"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(after[key], again[key]) for key in after)
    assert [path.name for path in (tmp_path / "clients").iterdir()] == ["ann"]
    assert read(tmp_path / "clients/ann").rank == 4


def test_a_prompt_is_read_and_a_completion_is_learned(
    tmp_path: Path, train: Callable[..., None]
) -> None:
    import train_client

    base = base_model(tmp_path, llama)
    model = LlamaForCausalLM.from_pretrained(base)
    rows = [
        {"prompt": "sea is", "completion": "blue"},
        {"prompt": "plus " * 20, "completion": "red red"},
    ]
    samples = train_client.samples_of(rows, tmp_path, model, limit=12)
    (batch,) = train_client.batches(samples, torch.arange(2), 2, model)

    word = tokenizer().convert_tokens_to_ids
    red, blue, plus = word("red"), word("blue"), word("plus")
    assert batch["input_ids"][0].tolist() == [word("sea"), word("is"), blue, 2] + 8 * [0]
    assert batch["attention_mask"][0].tolist() == 4 * [1] + 8 * [0]
    assert batch["labels"][0].tolist() == [-100, -100, blue, 2] + 8 * [-100]
    assert batch["input_ids"][1].tolist() == 9 * [plus] + [red, red, 2]
    assert batch["labels"][1].tolist() == 9 * [-100] + [red, red, 2]


IMAGE = [[[0.5] * 8] * 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows in it"),
        ("pixels\n", "neither JSON Lines nor CSV"),
        ('{"pixel_values": 1}\n{"labels": 1}\n', "row 2 is no object with the fields"),
        ('{"pixels": [1.0], "labels": 1}', "does not take pixels, but text, label; or pixel_va"),
        ('{"text": "sea", "labels": 1}', "does not take text, but text, label"),
        ('{"pixel_values": [[1, 2], [3]], "labels": 1}', "row 1 is not made of numbers"),
        (json.dumps({"pixel_values": IMAGE}), "it has no labels to learn from"),
        (json.dumps({"pixel_values": IMAGE, "labels": 10}), "the model cannot take it (Target 10"),
        (json.dumps({"pixel_values": IMAGE[0], "labels": 1}), "the model cannot take it"),
    ],
)
def test_wrong_data_is_one_line_and_leaves_nothing(
    tmp_path: Path, train: Callable[..., None], content: str, message: str
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(content)
    start = tmp_path / "start"
    options = InitOptions(ranks=(2,), target_modules=("q_proj",), modules_to_save=("classifier",))
    initialize(SAMPLES / "base", start, options=options)

    with pytest.raises(SystemExit) as stopped:
        train(start / "rank-2", own, "-o", tmp_path / "ann")

    line = str(stopped.value)
    assert line.startswith(f"error: {own}: ")
    assert message in line
    assert "\n" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl", "start"]


def test_a_model_that_does_not_fit_and_a_taken_folder_are_told(
    tmp_path: Path, train: Callable[..., None]
) -> None:
    start = started(tmp_path, bert, task="SEQ_CLS", num_labels=3)
    own = written(tmp_path / "own.jsonl", CLASSES)
    for adapter, output, message in (
        (tmp_path, tmp_path / "ann", "no adapter in it"),
        (start, tmp_path / "ann", "size mismatch"),  # two labels are BERT's default
        (start, tmp_path / "base", "it already exists"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(adapter, own, "-o", output)
    assert not (tmp_path / "ann").exists()
