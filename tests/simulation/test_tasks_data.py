"""The data of a task: its parts, its columns, and what is refused of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from support.tasks import COLOURS, refused, save_lines, save_texts

from fedlora_cli.errors import InputError
from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.tasks.corpus import read_corpus
from fedlora_cli.simulation.tasks.texts import _WANTED as TEXTS

pytestmark = pytest.mark.usefixtures("apart")


def rows_of(source: Source, seed: int = 0) -> list[list[str]]:
    corpus = read_corpus(source, TEXTS, seed)
    return [
        part.read(np.arange(len(part)))[0]
        for part in (corpus.train, corpus.validation, corpus.test)
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
    texts = corpus.train.read(np.arange(len(corpus.train)))[0]

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
    assert set(corpus.train.read(np.arange(16))[0]) == {"NA", "null"}


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


# What is refused.


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
            "has no class in some rows",
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

    assert "the column image holds string; name a column of images" in found


def test_unlabelled_examples_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    for name, labels in (("train", [0, 1] * 5), ("test", [-1] * 10)):
        rows = datasets.Dataset.from_dict({"text": ["a"] * 10, "label": labels}, features)
        rows.to_parquet(tmp_path / f"{name}.parquet")

    found = refused(replace(sources["text-classification"], data=(str(tmp_path),)))

    assert "has no class in some rows; leave these rows out, or name another --test-split" in found


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
        (
            "tarred",
            None,
            "its files need the reader webdataset, which is not allowed; save them as parquet",
        ),
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

    assert "no such path, and the hub does not give it" in refused(
        replace(source, data=("nobody/nothing",))
    )
    # These are names of the library's readers, which would read whatever is in this folder.
    assert refused(replace(source, data=("csv",))).startswith("csv: no such file or folder")
    assert "different kinds" in refused(replace(source, data=(*source.data, __file__)))
