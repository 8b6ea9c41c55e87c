"""Images and texts with classes: what batches hold, heads, and what is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.tasks import (
    COLOURS,
    EOS,
    PAD,
    adapted,
    bert_config,
    everything,
    llama_config,
    make_task,
    png,
    save_images,
    save_lines,
    save_model,
    save_tokenizer,
    vit_config,
)
from transformers import BertForMaskedLM, LlamaModel, ViTForImageClassification, ViTModel

from fedlora_cli.errors import InputError
from fedlora_cli.simulation.options import Source

pytestmark = pytest.mark.usefixtures("apart")


# Images.


def test_images_are_scaled_to_the_model(sources: dict[str, Source]) -> None:
    task = make_task(sources["image-classification"], 0)
    batch = everything(task.train)

    assert batch["pixel_values"].shape == (24, 3, 8, 8)
    assert batch["labels"].tolist() == task.train.labels.tolist()
    assert (task.num_labels, task.modules_to_save) == (3, ("classifier",))
    # A plain colour is its channel at 1, less its shade, and the others at -1.
    brightest = batch["pixel_values"].mean((2, 3)).argmax(1)
    channels = {0: 2, 1: 1, 2: 0}
    assert brightest.tolist() == [channels[label] for label in task.train.labels.tolist()]
    assert float(batch["pixel_values"].min()) == -1
    assert 0.8 < float(batch["pixel_values"].max()) <= 1


@pytest.mark.parametrize("kind", ["features", "struct", "binary", "grey"])
def test_images_in_a_table_have_the_channels_of_the_model(tmp_path: Path, kind: str) -> None:
    config = vit_config(num_channels=1 if kind == "grey" else 3, dtype="bfloat16")
    model = save_model(ViTForImageClassification(config), tmp_path / "vit")
    contents = [png(colour, k) for k in range(5) for colour in COLOURS.values()]
    stored = contents if kind == "binary" else [{"bytes": one, "path": None} for one in contents]
    rows = datasets.Dataset.from_dict(
        {"img": stored, "fine_label": [0, 1, 2] * 5, "other": [0] * 15}
    )
    if kind == "features":
        rows = rows.cast_column("img", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    data = (str(tmp_path / "rows.parquet"),)

    task = make_task(Source("image-classification", str(model), data, dtype="bfloat16"), 0)

    pixels = everything(task.train)["pixel_values"]
    assert pixels.shape == (12, 1 if kind == "grey" else 3, 8, 8)
    assert pixels.dtype == torch.bfloat16
    assert task.load()(pixel_values=pixels).logits.shape == (12, 3)


def test_the_model_has_its_own_way_with_images(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["image-classification"]
    torch.manual_seed(0)
    folder = save_model(ViTForImageClassification(vit_config()), tmp_path / "vit")
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    own = everything(make_task(replace(source, model=str(folder)), 0).train)["pixel_values"]

    plain = everything(make_task(source, 0).train)["pixel_values"]
    torch.testing.assert_close(own, plain + 1)


def test_images_stand_upright(sources: dict[str, Source], tmp_path: Path) -> None:
    """A camera writes which side is up beside the pixels."""
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    turned = Image.Exif()
    turned[0x0112] = 3  # by half a turn
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(6):
            image.save(tmp_path / "pictures" / name / f"{k}.png", exif=turned)
    source = replace(sources["image-classification"], data=(str(tmp_path / "pictures"),))

    pixels = everything(make_task(source, 0).train)["pixel_values"]

    assert float(pixels[:, :, :4].max()) == -1
    assert float(pixels[:, :, 4:].min()) == 1


def test_broken_images_are_named(sources: dict[str, Source], tmp_path: Path) -> None:
    folder = save_images(tmp_path / "pictures")
    for path in folder.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:45])
    task = make_task(replace(sources["image-classification"], data=(str(folder),)), 0)

    with pytest.raises(InputError, match=r"\d\.png: an image cannot be decoded \(.*\); replace it"):
        everything(task.train)


def test_a_base_model_without_a_head_gets_one(sources: dict[str, Source], tmp_path: Path) -> None:
    """As ViT-Base of ImageNet-21k, which was saved as a ViTModel."""
    folder = save_model(ViTModel(vit_config()), tmp_path / "vit")
    task = make_task(replace(sources["image-classification"], model=str(folder)), 0)
    model = adapted(task, tmp_path / "start")

    assert model.base_model.model.classifier.modules_to_save["default"].weight.shape[0] == 3
    assert model.peft_config["default"].task_type is None


def test_a_head_of_the_same_classes_is_kept(tmp_path: Path, sources: dict[str, Source]) -> None:
    torch.manual_seed(1)
    model = ViTForImageClassification(vit_config(num_labels=3))
    source = replace(sources["image-classification"], model=str(save_model(model, tmp_path / "v")))

    wrapped = adapted(make_task(source, 0), tmp_path / "start")

    head = wrapped.base_model.model.classifier.modules_to_save["default"].weight
    torch.testing.assert_close(head, model.classifier.weight)


# Texts.


def test_texts_are_padded_per_batch_and_cut(sources: dict[str, Source]) -> None:
    source = sources["text-classification"]
    task, short = make_task(source, 0), make_task(replace(source, max_length=2), 0)

    batch, cut = everything(task.train), everything(short.train)

    assert batch.keys() >= {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (24, 3)
    assert bool((batch["attention_mask"] == 1).all())
    assert torch.equal(cut["input_ids"], batch["input_ids"][:, :2])


def test_padding_is_masked_and_a_blank_text_is_one_token(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    texts = ["red", "sea sea sea", " ", "sea " * 40] * 5
    rows = [{"sentence": text, "label": k % 2} for k, text in enumerate(texts)]
    data = (str(save_lines(tmp_path / "rows.jsonl", rows)),)
    task = make_task(replace(sources["text-classification"], data=data), 0)

    batch = everything(task.train)

    assert batch["input_ids"].shape == (16, 12)  # the model has no more positions
    lengths = batch["attention_mask"].sum(1).tolist()
    assert set(lengths) == {1, 3, 12}
    assert all(
        row[:n].all() and not row[n:].any()
        for row, n in zip(batch["attention_mask"], lengths, strict=True)
    )
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {PAD}
    assert task.train.batch(np.flatnonzero(np.array(lengths) == 1)[:1])["input_ids"].shape == (1, 1)


def test_a_decoder_classifies_with_the_end_of_a_text_as_padding(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    folder = save_model(LlamaModel(llama_config()), tmp_path / "llama")
    save_tokenizer(folder, eos_token="[EOS]")
    task = make_task(replace(sources["text-classification"], model=str(folder)), 0)

    model = adapted(task, tmp_path / "start")

    assert model.config.pad_token_id == EOS
    one, two = (task.train.batch(np.array(chosen)) for chosen in ([0], [0, 1]))
    with torch.no_grad():
        alone, beside = model.eval()(**one).logits, model(**two).logits
    torch.testing.assert_close(alone[0], beside[0])


def test_a_layer_that_would_stay_random_is_refused(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    folder = save_model(BertForMaskedLM(bert_config()), tmp_path / "bert")
    save_tokenizer(folder, pad_token="[PAD]")
    source = replace(sources["text-classification"], model=str(folder))

    with pytest.raises(InputError, match=r"its files have no bert\.pooler\.dense"):
        make_task(source, 0).load()
    adapted(make_task(replace(source, modules_to_save=("pooler",)), 0), tmp_path / "start")


class Oracle:
    """A classifier that is told the classes, and is wrong about the first ones."""

    device = torch.device("cpu")

    def __init__(self, labels: np.ndarray, wrong: int) -> None:
        self.labels = torch.from_numpy(labels.copy())
        self.labels[:wrong] = (self.labels[:wrong] + 1) % 3

    def __call__(self, **batch: torch.Tensor) -> Any:
        assert "labels" not in batch
        return SimpleNamespace(logits=torch.eye(3)[self.labels])


@pytest.mark.parametrize("family", ["image-classification", "text-classification"])
def test_what_is_right_is_counted(sources: dict[str, Source], family: str) -> None:
    task = make_task(sources[family], 0)
    chosen = np.arange(4, 14)

    for wrong in (0, 4, 10):
        oracle = Oracle(task.train.labels[chosen], wrong)
        assert task.right(oracle, task.train, chosen) == 10 - wrong
