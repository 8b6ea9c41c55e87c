"""Tasks with the user's own model and data: what batches hold, what is right, what is refused."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from fedlora_cli.errors import FedloraError, InputError
from fedlora_cli.rounds.initialise import initialise
from fedlora_cli.rounds.options import InitOptions
from fedlora_cli.simulation.options import SimulateOptions, Source
from fedlora_cli.simulation.presets import NOTES, PRESETS
from fedlora_cli.simulation.task import Examples, Task
from fedlora_cli.simulation.tasks.corpus import read_corpus
from fedlora_cli.simulation.tasks.families import FAMILIES, make_task
from fedlora_cli.simulation.tasks.language import Dialogues, same_answer
from fedlora_cli.simulation.tasks.texts import _WANTED as TEXTS
from fedlora_cli.simulation.workers import threads

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


@pytest.fixture(autouse=True)
def _alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Nothing is left in anybody's cache, and one core is enough for models so small."""
    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    with threads(1):
        yield


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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A tiny model and a few examples of every family."""
    root = tmp_path_factory.mktemp("tasks")
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


@pytest.fixture(params=list(FAMILIES))
def source(request: pytest.FixtureRequest, sources: dict[str, Source]) -> Source:
    return sources[request.param]


def everything(examples: Examples) -> dict[str, torch.Tensor]:
    return examples.batch(np.arange(len(examples)))


def parts_of(task: Task) -> tuple[Examples, Examples, Examples]:
    return task.train, task.validation, task.test


def adapted(task: Task, folder: Path) -> PeftModel:
    """The model with an initial adapter, as `fedlora init` writes it."""
    options = InitOptions(
        ranks=(4,),
        task=task.task,
        target_modules=task.target_modules,
        modules_to_save=task.modules_to_save,
        num_labels=task.num_labels,
    )
    initialise(task.model, folder, options=options)
    return PeftModel.from_pretrained(task.load(), str(folder / "rank-4"), is_trainable=True)


def test_twenty_steps_lower_the_loss(source: Source, tmp_path: Path) -> None:
    task = make_task(source, 0)
    model = adapted(task, tmp_path / "start")
    batch = everything(task.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)

    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()

    assert model(**batch).loss.item() < 0.8 * losses[0]
    with torch.no_grad():
        right = task.right(model.eval(), task.test, np.arange(len(task.test)))
    assert 0 <= right <= len(task.test)


def test_the_adapter_fits_the_model_and_brings_its_head(source: Source, tmp_path: Path) -> None:
    task = make_task(source, 0)
    first, second = (adapted(task, tmp_path / name) for name in ("first", "second"))

    names = {name for name, one in first.named_parameters() if one.requires_grad}
    assert any("lora_A" in name for name in names)
    heads = {"image-classification": "classifier", "text-classification": "classifier"}
    head = heads.get(source.family)
    assert {n.split(".")[-4] for n in names if "modules_to_save" in n} == (
        {head} if head else set()
    )
    assert not any("lora" in name for name in names if head and f".{head}." in name)
    # However the layers that the base model lacks are drawn, what is computed is the same.
    batch = everything(task.validation)
    with torch.no_grad():
        torch.testing.assert_close(first.eval()(**batch).loss, second.eval()(**batch).loss)


def test_loading_leaves_the_random_numbers_alone(sources: dict[str, Source]) -> None:
    task = make_task(sources["text-classification"], 0)
    torch.manual_seed(3)
    expected = torch.rand(2)

    torch.manual_seed(3)
    task.load()

    torch.testing.assert_close(torch.rand(2), expected)


def test_the_same_seed_makes_the_same_task(source: Source) -> None:
    first, second, other = (make_task(source, seed) for seed in (1, 1, 2))

    for ours, theirs in zip(parts_of(first), parts_of(second), strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist()
        mine, yours = everything(ours), everything(theirs)
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[name], yours[name]) for name in mine)
    key = "pixel_values" if source.family == "image-classification" else "input_ids"
    assert not torch.equal(everything(first.train)[key], everything(other.train)[key])


def test_a_batch_is_read_at_its_positions(source: Source) -> None:
    task = make_task(source, 0)
    whole = everything(task.train)
    chosen = np.array([5, 0])

    for name, tensor in task.train.batch(chosen).items():
        expected = whole[name][chosen]
        assert tensor.dtype == expected.dtype
        torch.testing.assert_close(
            tensor, expected[:, : tensor.shape[1]] if tensor.dim() == 2 else expected
        )


# The parts of the data.


def rows_of(source: Source, seed: int = 0) -> list[list[str]]:
    corpus = read_corpus(source, TEXTS, seed)
    return [
        part.inputs(np.arange(len(part))) for part in (corpus.train, corpus.validation, corpus.test)
    ]


def test_a_fifth_is_held_out_and_halved_with_all_classes(sources: dict[str, Source]) -> None:
    corpus = read_corpus(sources["text-classification"], TEXTS, 0)
    rows = rows_of(sources["text-classification"])

    assert [len(part) for part in rows] == [24, 3, 3]
    assert len({text for part in rows for text in part}) == 30
    assert corpus.classes == 3
    assert np.bincount(corpus.train.labels).tolist() == [8, 8, 8]
    held_out = np.concatenate([corpus.validation.labels, corpus.test.labels])
    assert np.bincount(held_out).tolist() == [2, 2, 2]


def test_rare_classes_are_in_every_part_in_their_proportion(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    rows = [{"text": f"{k}", "label": "rare" if k % 10 == 0 else "usual"} for k in range(200)]
    source = replace(
        sources["text-classification"], data=(str(save_lines(tmp_path / "rows.jsonl", rows)),)
    )

    corpus = read_corpus(replace(source, limit=40), TEXTS, 0)

    for part, expected in ((corpus.train, 4), (corpus.validation, 2), (corpus.test, 2)):
        assert abs(int((part.labels == 0).sum()) - expected) <= 1


def test_classes_are_numbered_in_sorted_order(sources: dict[str, Source]) -> None:
    source = sources["text-classification"]
    corpus = read_corpus(source, TEXTS, 0)
    texts = corpus.train.inputs(np.arange(len(corpus.train)))

    names = [sorted(COLOURS)[label] for label in corpus.train.labels]
    assert [text.split()[0] for text in texts] == names


def test_a_test_split_is_found_by_its_name_and_halved(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    train = save_texts(tmp_path / "folder" / "train.csv", 12)
    test = save_texts(tmp_path / "folder" / "test.csv", 9)
    source = sources["text-classification"]
    of_files = replace(source, data=(str(test), str(train)))
    of_folder = replace(source, data=(str(tmp_path / "folder"),))

    for one in (of_files, of_folder):
        parts = rows_of(one)
        assert [len(part) for part in parts] == [12, 4, 5]
        assert sorted(parts[1] + parts[2]) == sorted(
            line.split(",")[0] for line in test.read_text().splitlines()[1:]
        )


def test_splits_can_be_named(sources: dict[str, Source], tmp_path: Path) -> None:
    for name, number in (("train", 12), ("validation", 8), ("test", 10)):
        save_texts(tmp_path / f"{name}.csv", number)
    source = replace(sources["text-classification"], data=(str(tmp_path),))

    assert [len(part) for part in rows_of(replace(source, test_split="validation"))] == [12, 4, 4]
    assert [len(part) for part in rows_of(replace(source, train_split="test"))] == [8, 1, 1]
    with pytest.raises(InputError, match=r"no split dev; its splits are train, validation, test"):
        rows_of(replace(source, test_split="dev"))


def test_a_limit_bounds_every_split(sources: dict[str, Source]) -> None:
    source = sources["text-classification"]
    whole = rows_of(source)
    corpus = read_corpus(replace(source, limit=5), TEXTS, 0)
    limited = rows_of(replace(source, limit=5))

    assert [len(part) for part in limited] == [5, 2, 3]
    assert set(limited[0]) <= set(whole[0])
    assert sorted(np.bincount(corpus.train.labels, minlength=3).tolist()) == [1, 2, 2]


def test_texts_of_lines_keep_words_that_look_like_nothing(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "NA,None\nnull,some\n" * 10)

    corpus = read_corpus(replace(sources["text-classification"], data=(str(path),)), TEXTS, 0)

    assert corpus.classes == 2
    assert set(corpus.train.inputs(np.arange(16))) == {"NA", "null"}


def test_whole_numbers_and_flags_are_classes(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["text-classification"]
    for values in ([3, 5, 9], [True, False]):
        rows = [{"text": f"{k}", "label": values[k % len(values)]} for k in range(20)]
        path = save_lines(tmp_path / f"{len(values)}.jsonl", rows)

        corpus = read_corpus(replace(source, data=(str(path),)), TEXTS, 0)

        assert corpus.classes == len(values)
        assert set(corpus.train.labels) == set(range(len(values)))


def test_a_name_on_the_hub_goes_there_with_its_configuration(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["text-classification"]
    save_texts(tmp_path / "folder" / "train.csv")
    expected, asked = rows_of(source), []

    def here(name: str, config: str | None) -> Any:
        asked.append((name, config))
        return real(str(tmp_path / "folder"))

    real = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", here)

    assert rows_of(replace(source, data=("owner/texts",), config="main")) == expected
    assert asked == [("owner/texts", "main")]


def test_nothing_is_said(source: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By libraries that like to tell of bars, heads that are new, and texts that are long."""
    data = tmp_path / Path(source.data[0]).name  # what has been read already is not read again
    (shutil.copytree if Path(source.data[0]).is_dir() else shutil.copy)(source.data[0], data)
    capfd.readouterr()

    short = {} if source.family == "image-classification" else {"max_length": 2}
    task = make_task(replace(source, data=(str(data),), **short), 0)
    model = task.load().eval()
    everything(task.train)
    with torch.no_grad():
        task.right(model, task.test, np.arange(len(task.test)))

    assert capfd.readouterr() == ("", "")


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

    with pytest.raises(InputError, match=r"no bert\.pooler\.dense is read from its files"):
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


# Questions and answers.


def test_there_is_a_loss_on_the_answer_and_its_end_alone(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    rows = [{"question": "sea " * (1 + k % 3), "answer": "red " * (1 + k % 2)} for k in range(12)]
    data = (str(save_lines(tmp_path / "rows.jsonl", rows)),)
    task = make_task(replace(sources["causal-lm"], data=data), 0)

    batch = everything(task.train)

    sea, red = WORDS.index("sea"), WORDS.index("red")
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert task.train.labels.tolist() == [0] * 10
    for tokens, mask, labels in zip(
        *(batch[n].tolist() for n in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        questions, answers, length = tokens.count(sea), tokens.count(red), sum(mask)
        text = [BOS, *[sea] * questions, *[red] * answers, EOS]
        # The end of a text is what this tokenizer pads with, and yet it is learned once.
        assert tokens == text + [EOS] * (len(tokens) - length)
        assert mask == [1] * len(text) + [0] * (len(tokens) - len(text))
        ignored = [-100] * (1 + questions), [-100] * (len(tokens) - length)
        assert labels == [*ignored[0], *[red] * answers, EOS, *ignored[1]]


@pytest.mark.parametrize(
    ("length", "text", "learned"),
    [
        (10, "[BOS] 3 plus 4 3 plus 4 #### 7 [EOS]", 6),
        (9, "[BOS] plus 4 3 plus 4 #### 7 [EOS]", 6),
        (4, "[BOS] 4 3 plus", 2),
        (1, "[BOS] 4 3", 1),  # a token of each there must be
    ],
)
def test_a_long_text_loses_the_beginning_of_its_question(
    sources: dict[str, Source], length: int, text: str, learned: int
) -> None:
    task = make_task(replace(sources["causal-lm"], max_length=length), 0)
    dialogues = task.train.batch
    assert isinstance(dialogues, Dialogues)
    questions = dialogues.part.inputs(np.arange(len(task.train)))

    batch = task.train.batch(np.array([questions.index("3 plus 4")]))

    assert " ".join(WORDS[token] for token in batch["input_ids"][0]) == text
    assert int((batch["labels"] != -100).sum()) == learned


def test_questions_are_padded_on_the_left(sources: dict[str, Source], tmp_path: Path) -> None:
    rows = [{"question": "sea " * (1 + k % 3), "answer": "red"} for k in range(12)]
    data = (str(save_lines(tmp_path / "rows.jsonl", rows)),)
    task = make_task(replace(sources["causal-lm"], data=data, max_length=2), 0)
    dialogues = task.train.batch
    assert isinstance(dialogues, Dialogues)

    prompts, answers = dialogues.prompts(np.arange(10))

    assert answers == ["red"] * 10
    assert prompts["input_ids"].shape == (10, 4)
    for tokens, mask in zip(
        prompts["input_ids"].tolist(), prompts["attention_mask"].tolist(), strict=True
    ):
        assert mask == sorted(mask)
        assert tokens[4 - sum(mask)] == BOS
        assert EOS not in tokens[4 - sum(mask) :]


class Writer:
    """A model that answers what it is told to, token by token, for all questions in order."""

    device = torch.device("cpu")

    def __init__(self, answers: list[str]) -> None:
        self.answers = iter(answers)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int
    ) -> torch.Tensor:
        assert input_ids.shape == attention_mask.shape
        rows = [[WORDS.index(w) for w in next(self.answers).split()] for _ in input_ids]
        new = [[*row, *[EOS] * max_new_tokens][:max_new_tokens] for row in rows]
        return torch.cat([input_ids, torch.tensor(new)], 1)


def test_answers_are_counted_by_their_end(sources: dict[str, Source]) -> None:
    task = make_task(sources["causal-lm"], 0)
    assert isinstance(task.train.batch, Dialogues)
    positions = np.concatenate([np.arange(len(task.train))] * 2)  # beyond what is written at a time
    answers = [answer for _, answer in task.train.batch.part.pairs(positions)]
    ends = [answer.rpartition("####")[2] for answer in answers]

    right = [f"#### {end}" for end in ends]
    wrong = [f"####{end} ####" for end in ends[:7]]

    assert task.right(Writer(right), task.train, positions) == len(positions)
    assert task.right(Writer([*wrong, *right[7:]]), task.train, positions) == len(positions) - 7


def test_a_real_model_writes_its_answers(sources: dict[str, Source], tmp_path: Path) -> None:
    """One that has learned its sums by heart gets them right, and not others."""
    source = replace(sources["causal-lm"], target_modules="all-linear", max_new_tokens=6)
    rows = [{"question": f"{k}", "answer": "red #### 7"} for k in range(20)]
    task = make_task(replace(source, data=(str(save_lines(tmp_path / "r.jsonl", rows)),)), 0)
    model = adapted(task, tmp_path / "start")
    everywhere = np.arange(len(task.test))
    with torch.no_grad():
        assert task.right(model.eval(), task.test, everywhere) == 0

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        model(**everything(task.train)).loss.backward()
        optimizer.step()

    with torch.no_grad():
        assert task.right(model, task.test, everywhere) == len(task.test)


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("#### 1,042", "so #### 1042", True),
        ("so #### 5 #### 1042 ", "####1,042", True),
        ("#### 1043", "so #### 1042", False),
        ("so 1042", "so #### 1042", False),
        ("red,  blue\n", "red, blue", True),
        ("red blue", "red, blue", False),
        ("x #### red", "red", False),
        ("", "red", False),
    ],
)
def test_answers_are_compared_by_what_they_come_to(text: str, reference: str, same: bool) -> None:
    assert same_answer(text, reference) is same


# What is refused.


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A library that is not installed."""
    real = builtins.__import__

    def forget(library: str) -> None:
        def absent(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", absent)

    return forget


@pytest.mark.parametrize(
    ("library", "family"), [("datasets", "causal-lm"), ("PIL", "image-classification")]
)
def test_a_missing_library_is_named(
    sources: dict[str, Source], without: Any, library: str, family: str
) -> None:
    without(library)

    with pytest.raises(InputError, match=rf"{library}.*; pip install 'fedlora\[simulate\]'$"):
        make_task(sources[family], 0)


def refused(source: Source) -> str:
    with pytest.raises(FedloraError) as caught:
        make_task(source, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_columns_are_named_with_those_there_are(sources: dict[str, Source]) -> None:
    source = sources["text-classification"]
    path = source.data[0]

    found = refused(replace(source, label="kind"))
    assert found == f"{path}: no column kind; name one with --label; there are text, category"
    assert refused(replace(source, input="category")).startswith("--input, --label: both are")
    assert refused(replace(source, label="text")).startswith("--input, --label: both are")
    assert "holds 30 different values in 30 rows" in refused(
        replace(source, input="category", label="text")
    )
    lm = replace(sources["causal-lm"], data=(path,))
    assert "no column answer, completion, response, output, target or label" in refused(lm)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"text": 1, "label": 0}], "the column text holds int64"),
        ([{"text": "a", "label": 0.5}], "the column label holds float64, not classes"),
        ([{"text": "a", "label": [0]}], "the column label holds nested values"),
        ([{"text": "a", "label": 0}], "the column label holds 1 different values in 20 rows"),
        ([{"text": "a", "label": "x"}, {"text": None, "label": "y"}], "text is empty in 10 of 20"),
        (
            [{"text": "a", "label": ""}, {"text": "a", "label": "x"}],
            "leaves the class of some rows",
        ),
        ([{"image": "a.png", "label": "x"}], "no column text, sentence, content or question"),
    ],
)
def test_columns_of_the_wrong_kind_are_refused(
    sources: dict[str, Source], tmp_path: Path, rows: list[dict[str, Any]], found: str
) -> None:
    path = save_lines(tmp_path / "rows.jsonl", rows * (20 // len(rows)))

    assert found in refused(replace(sources["text-classification"], data=(str(path),)))


def test_paths_to_images_are_not_followed(sources: dict[str, Source], tmp_path: Path) -> None:
    path = save_lines(tmp_path / "r.jsonl", [{"image": "a.png", "label": k % 2} for k in range(20)])

    found = refused(replace(sources["image-classification"], data=(str(path),)))

    assert "the column image holds string; name one of images" in found


def test_unlabelled_examples_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    for name, labels in (("train", [0, 1] * 5), ("test", [-1] * 10)):
        rows = datasets.Dataset.from_dict({"text": ["a"] * 10, "label": labels}, features)
        rows.to_parquet(tmp_path / f"{name}.parquet")

    found = refused(replace(sources["text-classification"], data=(str(tmp_path),)))

    assert (
        "leaves the class of some rows open; leave them out, or name another --test-split" in found
    )


def test_too_few_examples_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["text-classification"]
    few = replace(source, data=(str(save_texts(tmp_path / "few.csv", 6)),))

    assert "5 examples to train on and 1 held out are too few; give more data" in refused(few)
    assert "1 examples to train on and 1 held out" in refused(replace(source, limit=1))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("gone.csv", None, "no such file or folder"),
        ("a.pkl", b"\x80\x04.", "files of an unknown kind; give files of one kind: .csv"),
        ("a.jsonl", b'{"a": 1}\n{"a":', "cannot be read (JSON parse error"),
        ("a.parquet", b"PAR1", "cannot be read (Parquet"),
        ("a.csv", b"", "cannot be read (No columns"),
        ("folder", None, "cannot be read ("),
        ("tarred", None, "its files are read as webdataset; save them as parquet"),
        ("scripted", None, "cannot be read (Dataset scripts are no longer supported"),
    ],
)
def test_damaged_data_is_one_line(
    sources: dict[str, Source],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    found: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name != "gone.csv":
        path.mkdir()
        (path / ("a.tar" if name == "tarred" else "a.pkl")).write_bytes(b"\x80\x04.")
    if name == "scripted":
        (path / "scripted.py").write_text("raise SystemExit(7)")

    said = refused(replace(sources["text-classification"], data=(str(path),)))

    assert said.startswith(f"{path}: {found}")
    assert capfd.readouterr() == ("", "")


def test_data_that_is_neither_here_nor_there_is_one_line(sources: dict[str, Source]) -> None:
    source = sources["text-classification"]

    assert "no such path here, and not to be had from the hub" in refused(
        replace(source, data=("nobody/nothing",))
    )
    # These are names of the library's readers, which would read whatever is in this folder.
    assert refused(replace(source, data=("csv",))).startswith("csv: no such file or folder")
    assert "different kinds" in refused(replace(source, data=(*source.data, __file__)))


def test_models_that_are_not_there_or_not_fit_are_one_line(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    image, text = sources["image-classification"], sources["text-classification"]
    (tmp_path / "empty").mkdir()

    assert "its tokenizer cannot be read" in refused(replace(text, model=str(tmp_path / "empty")))
    assert "its configuration cannot be read" in refused(
        replace(image, model=str(tmp_path / "empty"))
    )
    assert "its configuration cannot be read" in refused(replace(image, model=text.model))
    assert "--dtype: int8 is not known" in refused(replace(image, dtype="int8"))
    bare = save_model(LlamaForCausalLM(llama_config()), tmp_path / "bare")
    save_tokenizer(bare)
    assert "no token for padding" in refused(replace(text, model=str(bare)))
    save_tokenizer(bare, pad_token="[PAD]")
    assert "no token for the end" in refused(replace(sources["causal-lm"], model=str(bare)))


def test_pickled_weights_and_code_are_never_opened(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    source = sources["causal-lm"]
    folder = save_model(LlamaForCausalLM(llama_config()), tmp_path / "llama")
    save_tokenizer(folder, eos_token="[EOS]")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    task = make_task(replace(source, model=str(folder)), 0)
    with pytest.raises(InputError, match="its model cannot be read"):
        task.load()

    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit(7)")

    assert "cannot be read" in refused(replace(source, model=str(folder)))


# Presets.


def test_presets_are_settings_of_their_own() -> None:
    assert next(iter(PRESETS)) == "digits"
    assert PRESETS["digits"] == SimulateOptions()
    assert PRESETS.keys() == NOTES.keys()
    assert {preset.setting.source.family for preset in PRESETS.values()} == {"digits", *FAMILIES}
    for name, preset in PRESETS.items():
        assert "\n" not in NOTES[name]
        assert len(set(preset.setting.ranks)) > 1
