"""`auto_mapping`: the class of the base model, which AutoPeftModel loads where there is no task."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel
from support.adapters import CONFIG, Spec, config, make
from support.models import bert, llama, save, vit, wrap
from support.starts import Base, save_base, set_config
from transformers import PreTrainedModel

from fedlora_cli import (
    DistributeOptions,
    InitOptions,
    InputError,
    aggregate,
    distribute,
    initialize,
    read,
)
from fedlora_cli.libraries import muted

LLAMA = {
    "base_model_class": "LlamaForCausalLM",
    "parent_library": "transformers.models.llama.modeling_llama",
}
BERT = {
    "base_model_class": "BertForSequenceClassification",
    "parent_library": "transformers.models.bert.modeling_bert",
}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return partial(save_base, tmp_path / "base")


def by_itself(folder: Path) -> PeftModel:
    """The adapter as PEFT loads it without being told a class."""
    with muted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoPeftModel.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("build", "targets", "task"),
    [
        (llama, ["q_proj"], None),
        (bert, ["query"], None),
        (vit, ["q_proj"], None),
        (vit, ["q_proj"], "IMAGE_CLS"),
    ],
)
def test_all_that_is_written_loads_by_itself_as_clients_without_a_task_do(
    tmp_path: Path,
    base: Base,
    build: Callable[[], PreTrainedModel],
    targets: list[str],
    task: str | None,
) -> None:
    home = base(build)
    with muted():
        model = type(build()).from_pretrained(home)
    for name, rank in (("ann", 2), ("bob", 3)):
        client = wrap(model, LoraConfig(r=rank, target_modules=targets))
        torch.nn.init.ones_(next(p for n, p in client.named_parameters() if "lora_B" in n))
        save(client, tmp_path / "clients" / name)
        client.unload()

    chosen = InitOptions(ranks=(2,), target_modules=tuple(targets), task=task)
    initialize(home, tmp_path / "start", options=chosen)
    initialize(home, tmp_path / "like", [tmp_path / "clients"], InitOptions(task=task))
    aggregate([tmp_path / "clients"], tmp_path / "global")
    distribute(tmp_path / "global", tmp_path / "back", [tmp_path / "clients"])
    distribute(tmp_path / "global", tmp_path / "ranks", options=DistributeOptions(ranks=(2,)))

    written = ["start/rank-2", "like/ann", "global", "back/bob", "ranks/rank-2"]
    for folder in written:
        loaded = by_itself(tmp_path / folder)
        assert type(loaded.get_base_model()) is type(model)
        assert (
            config(tmp_path / folder)["auto_mapping"]
            == config(tmp_path / "clients/ann")["auto_mapping"]
        )


def test_a_task_tells_the_class_and_nothing_else_is_written(tmp_path: Path, base: Base) -> None:
    options = InitOptions(ranks=(2,), target_modules=("q_proj",), task="CAUSAL_LM")
    initialize(base(llama), tmp_path / "start", options=options)
    set_fields(tmp_path / "start/rank-2", auto_mapping=LLAMA)
    report = aggregate([tmp_path / "start/rank-2"], tmp_path / "global")

    for folder in ("start/rank-2", "global"):
        assert config(tmp_path / folder)["task_type"] == "CAUSAL_LM"
    assert "auto_mapping" not in config(tmp_path / "global")
    assert not [one for one in report.warnings if "AutoPeftModel" in one]


def set_fields(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def clients(root: Path, *mappings: Any) -> Path:
    for number, mapping in enumerate(mappings):
        fields = {} if mapping is None else {"auto_mapping": mapping}
        make(root / "clients", Spec(f"client-{number}", rank=2, config=fields))
    return root / "clients"


@pytest.mark.parametrize(
    ("mappings", "expected", "warning"),
    [
        ((LLAMA, LLAMA, LLAMA), LLAMA, None),
        ((LLAMA, LLAMA, None), LLAMA, None),
        ((LLAMA, None, None), LLAMA, "only client-0 states the model class: transformers.models."),
        ((None, None), None, None),
        (
            (LLAMA, BERT, LLAMA),
            None,
            "different model classes (BertForSequenceClassification, LlamaForCausalLM)",
        ),
    ],
)
def test_the_class_is_what_the_clients_agree_on(
    tmp_path: Path, mappings: tuple[Any, ...], expected: Any, warning: str | None
) -> None:
    report = aggregate([clients(tmp_path, *mappings)], tmp_path / "global")

    assert config(tmp_path / "global").get("auto_mapping") == expected
    told = [one for one in report.warnings if "class" in one]
    assert [warning in one for one in told] == ([] if warning is None else [True])


@pytest.mark.parametrize(
    "mapping",
    [
        LLAMA | {"parent_library": "os"},
        LLAMA | {"parent_library": "transformers.models.llama.modeling_llama.os"},
        LLAMA | {"parent_library": "transformers.models.llama.modeling_bert"},
        LLAMA | {"parent_library": "transformers.models.auto.modeling_auto"},
        LLAMA | {"parent_library": "transformers.models.llama.modeling_llama\n"},
        LLAMA | {"parent_library": "transformers_models.llama.modeling_llama"},
        LLAMA | {"parent_library": "transformers.utils.hub"},
        LLAMA | {"parent_library": ["transformers.models.llama.modeling_llama"]},
        LLAMA | {"base_model_class": "__class__"},
        LLAMA | {"base_model_class": "logger"},
        LLAMA | {"base_model_class": "LlamaForCausalLM.from_pretrained"},
        LLAMA | {"base_model_class": "Llámá"},
        LLAMA | {"base_model_class": "L" * 1000},
        {"base_model_class": "LlamaForCausalLM"},
        "LlamaForCausalLM",
        [1, 2],
    ],
)
def test_anything_but_a_model_class_of_transformers_is_told_and_not_passed_on(
    tmp_path: Path, mapping: Any
) -> None:
    report = aggregate([clients(tmp_path, LLAMA, mapping)], tmp_path / "global")

    [told] = [one for one in report.warnings if "auto_mapping" in one]
    assert told.startswith("client-1/adapter_config.json: auto_mapping is ")
    assert told.endswith("AutoPeftModel needs it or a task_type")
    assert "\n" not in told
    assert config(tmp_path / "global")["auto_mapping"] == LLAMA


def test_a_class_alone_is_no_model_to_be_like(tmp_path: Path, base: Base) -> None:
    """The start names the class that was made of the base model, whatever the client names."""
    home = base(llama)
    initialize(home, tmp_path / "start", options=InitOptions((2,), target_modules=("q_proj",)))
    set_fields(tmp_path / "start/rank-2", auto_mapping=BERT)

    initialize(home, tmp_path / "like", [tmp_path / "start"])

    assert config(tmp_path / "like/rank-2")["auto_mapping"] == LLAMA
    assert read(tmp_path / "like/rank-2").metadata.model_class == ".".join(
        (LLAMA["parent_library"], LLAMA["base_model_class"])
    )
    set_config(home, architectures=["BertForSequenceClassification"])
    with pytest.raises(InputError, match="BertForSequenceClassification cannot be built from its"):
        initialize(home, tmp_path / "other", [tmp_path / "start"])
