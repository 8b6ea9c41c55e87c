"""Tiny models and a few examples for every family of tasks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from fedlora_cli.errors import FedloraError
from fedlora_cli.rounds.initialize import initialize
from fedlora_cli.rounds.options import InitOptions
from fedlora_cli.simulation.loading import FAMILIES
from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.task import Examples, Task

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # the usual 0.02 is for far wider layers
}
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
PAD, UNK, BOS, EOS = range(4)
WORDS = [*SPECIAL, "####", "plus", "red", "green", "blue", "sea", *map(str, range(30))]


def make_task(source: Source, seed: int) -> Task:
    """The task of a source, whose test split the seed decides."""
    return FAMILIES[source.family](source, seed)


def save_tokenizer(folder: Path, *, begins: bool = False, **special: str) -> None:
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        words.post_processor = processors.TemplateProcessing("[BOS] $A", None, [("[BOS]", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(
        folder
    )


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def vit_config(**changes: Any) -> ViTConfig:
    return ViTConfig(**{"image_size": 8, "patch_size": 4, "num_channels": 3} | SIZES | changes)


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **SIZES)


def llama_config() -> LlamaConfig:
    return LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=1, **SIZES)


def png(colour: tuple[int, int, int], shade: int) -> bytes:
    image = Image.new("RGB", (10, 12), tuple(max(0, c - 2 * shade) for c in colour))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def save_images(folder: Path, number: int = 10) -> Path:
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for k in range(number):
            (folder / name / f"{k}.png").write_bytes(png(colour, k))
    return folder


def save_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_texts(path: Path, number: int = 30) -> Path:
    names = list(COLOURS)
    rows = [f"{names[k % 3]} {k} sea,a {names[k % 3]} one" for k in range(number)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["text,category", *rows]) + "\n")
    return path


SUMS = [
    {"question": f"{a} plus {b}", "answer": f"{a} plus {b} #### {a + b}"}
    for a in range(6)
    for b in range(5)
]


def make_sources(root: Path) -> dict[str, Source]:
    """A tiny model and a few examples of every family."""
    torch.manual_seed(0)
    vit = save_model(ViTForImageClassification(vit_config()), root / "vit")
    bert = save_model(BertModel(bert_config()), root / "bert")
    save_tokenizer(bert, pad_token="[PAD]")
    llama = save_model(LlamaForCausalLM(llama_config()), root / "llama")
    save_tokenizer(llama, begins=True, bos_token="[BOS]", eos_token="[EOS]")
    pictures = save_images(root / "pictures")
    texts = save_texts(root / "texts.csv")
    sums = save_lines(root / "sums.jsonl", SUMS)
    return {
        "image-classification": Source("image-classification", str(vit), (str(pictures),)),
        "text-classification": Source("text-classification", str(bert), (str(texts),)),
        "causal-lm": Source("causal-lm", str(llama), (str(sums),), max_new_tokens=4),
    }


def everything(examples: Examples) -> dict[str, torch.Tensor]:
    return examples.batch(np.arange(len(examples)))


def adapted(task: Task, folder: Path) -> PeftModel:
    """The model with an initial adapter, as `fedlora init` writes it."""
    options = InitOptions(
        ranks=(4,),
        task=task.task,
        target_modules=task.target_modules,
        modules_to_save=task.modules_to_save,
        num_labels=task.num_labels,
    )
    initialize(task.model, folder, options=options)
    return PeftModel.from_pretrained(task.load(), str(folder / "rank-4"), is_trainable=True)


def refused(source: Source) -> str:
    with pytest.raises(FedloraError) as caught:
        make_task(source, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)
