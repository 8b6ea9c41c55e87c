"""Federated training of the user's own models on local files, adapters on disk every round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tasks import (
    SUMS,
    bert_config,
    llama_config,
    save_images,
    save_lines,
    save_model,
    save_texts,
    save_tokenizer,
    vit_config,
)
from transformers import BertModel, LlamaForCausalLM, ViTForImageClassification

from fedlora_cli import diagnose, read
from fedlora_cli.simulation.arm import Arm
from fedlora_cli.simulation.options import Setting, SimulateOptions, Source, Split, Training
from fedlora_cli.simulation.simulate import simulate


def image_source(place: Path) -> Source:
    model = save_model(ViTForImageClassification(vit_config()), place / "vit")
    data = save_images(place / "images")
    return Source("image-classification", str(model), (str(data),), target_modules="all-linear")


def text_source(place: Path) -> Source:
    model = save_model(BertModel(bert_config()), place / "bert")
    save_tokenizer(model, pad_token="[PAD]")
    data = save_texts(place / "texts.csv")
    return Source("text-classification", str(model), (str(data),))


def language_source(place: Path) -> Source:
    model = save_model(LlamaForCausalLM(llama_config()), place / "llama")
    save_tokenizer(model, eos_token="[EOS]", pad_token="[PAD]")
    data = save_lines(place / "sums.jsonl", SUMS)
    return Source("causal-lm", str(model), (str(data),), max_new_tokens=6)


@pytest.mark.parametrize("make", [image_source, text_source, language_source])
def test_every_family_is_trained_in_rounds_through_files(make: object, tmp_path: Path) -> None:
    assert callable(make)
    torch.manual_seed(0)
    setting = Setting(
        make(tmp_path), ranks=(2, 2, 4), participation=1.0, split=Split(5.0), training=Training(3)
    )
    options = SimulateOptions(
        setting, (Arm("raflora", momentum=0.5),), (1e-2,), seeds=(0,), rounds=3, jobs=1
    )
    report = simulate(tmp_path / "run", options)

    (row,) = report.arms
    folder = Path(row.folders[0])
    losses = [json.loads(p.read_text())["loss"] for p in sorted(folder.glob("*/metrics.json"))]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert row.diverged == ()
    assert row.accuracy.mean is not None
    assert 0 <= row.accuracy.mean <= 1
    globals_ = [read(folder / f"round-{number:02}" / "global") for number in (1, 2, 3)]
    assert {one.rank for one in globals_} == {4}
    sides = [one.modules[next(iter(one.modules))].read() for one in globals_]
    assert not np.allclose(sides[0].B @ sides[0].A, sides[2].B @ sides[2].A)
    clients = [read(path) for path in sorted((folder / "round-03" / "clients").iterdir())]
    assert [one.rank for one in clients] == [2, 2, 4]
    assert diagnose(folder).subject == "rounds"
