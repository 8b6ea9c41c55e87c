"""Tasks with the user's own model and data, whatever their family."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tasks import (
    adapted,
    everything,
    llama_config,
    make_task,
    refused,
    save_model,
    save_tokenizer,
)
from transformers import LlamaForCausalLM

from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.simulation.loading import FAMILIES
from fedlora_cli.simulation.options import SimulateOptions, Source
from fedlora_cli.simulation.presets import NOTES, PRESETS
from fedlora_cli.simulation.task import Examples, Task

pytestmark = pytest.mark.usefixtures("apart")


@pytest.fixture(params=list(FAMILIES))
def source(request: pytest.FixtureRequest, sources: dict[str, Source]) -> Source:
    return sources[request.param]


def parts_of(task: Task) -> tuple[Examples, Examples, Examples]:
    return task.train, task.validation, task.test


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


@pytest.mark.parametrize(
    ("library", "told", "family"),
    [("datasets", "datasets", "causal-lm"), ("PIL", "Pillow", "image-classification")],
)
def test_a_missing_library_is_named(
    sources: dict[str, Source],
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    told: str,
    family: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(InputError, match=rf"{told}.*; pip install 'fedlora\[simulate\]'$"):
        make_task(sources[family], 0)


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
    assert "--dtype: unknown dtype float64" in refused(replace(image, dtype="float64"))
    with pytest.raises(UsageError, match="--dtype: 'int8' is out of range"):
        replace(image, dtype="int8")
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
