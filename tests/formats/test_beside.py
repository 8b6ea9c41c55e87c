"""Weights beside an adapter that no aggregation holds: they are named, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from support.adapters import Spec, make
from support.cli import run
from support.stores import Store

from fedlora_cli import aggregate, inspect
from fedlora_cli.formats.beside import is_weights

WEIGHTS = [
    "non_lora_trainables.bin",
    "value_head.safetensors",
    "value_head.bin",
    "mm_projector.bin",
    "adapter_model.bin",
    "pytorch_model.bin",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "consolidated.00.pth",
    "ema.PT",
    "last.ckpt",
    "adapter.gguf",
    "head.npz",
    "embeddings.pt",
]

STATES = [
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_0.bin",
    "scheduler.pt",
    "lr_scheduler.pt",
    "rng_state.pth",
    "rng_state_3.pth",
    "random_states_0.pkl",
    "scaler.pt",
    "sampler.bin",
    "training_args.bin",
    "trainer_state.pt",
    "recipe_state.pt",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
]

OTHERS = ["README.md", "tokenizer.json", "tokenizer.model", "trainer_state.json", "merges.txt"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_beside_an_adapter_are_named_everywhere(tmp_path: Path, name: str) -> None:
    for client in ("ann", "bob"):
        make(tmp_path / "round", Spec(client, rank=2))
    (tmp_path / "round/bob" / name).write_bytes(b"weights")
    told = f"bob: weights beside the adapter are left out: {name}"

    report = aggregate(tmp_path / "round", tmp_path / "out")
    notes = {one.name: one.notes for one in inspect(tmp_path / "round").adapters}

    assert [one for one in report.warnings if "beside" in one] == [told]
    assert told in json.loads((tmp_path / "out/fedlora.json").read_text())["warnings"]
    assert name in (tmp_path / "out/README.md").read_text().replace("\\", "")
    assert notes == {"ann": (), "bob": (told,)}
    for shown in ("", "bob"):
        assert told in run("inspect", str(tmp_path / "round" / shown)).stdout
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "fedlora.json")
    ]


def test_states_of_a_training_are_expected(tmp_path: Path) -> None:
    folder = make(tmp_path / "round", Spec("ann", rank=2)).folder
    for name in (*STATES, *OTHERS, ".hidden.bin"):
        (folder / name).write_bytes(b"x")
    (folder / "global_step9.pt").mkdir()

    assert not [w for w in aggregate(folder, tmp_path / "out").warnings if "beside" in w]
    assert not any(is_weights(name) for name in STATES)


def test_many_are_counted(tmp_path: Path) -> None:
    folder = make(tmp_path / "round", Spec("ann", rank=2)).folder
    for number in range(10):
        (folder / f"part-{number}.bin").write_bytes(b"x")

    [told] = [w for w in aggregate(folder, tmp_path / "out").warnings if "beside" in w]

    assert told.endswith("part-0.bin, part-1.bin, part-2.bin, part-3.bin, part-4.bin, part-5.bin, "
                         "part-6.bin, part-7.bin and 2 more")  # fmt: skip


def test_a_store_is_asked_for_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in ("ann", "bob"):
        make(tmp_path / "round", Spec(client, rank=2))
    questions = []
    for extra in (False, True):
        if extra:
            (tmp_path / "round/bob/value_head.bin").write_bytes(b"weights")
        store = Store()
        store.put(tmp_path / "round", "bucket/round")
        monkeypatch.setattr(fsspec, "filesystem", lambda protocol, made=store, **options: made)
        result = run("aggregate", "s3://bucket/round", "-o", str(tmp_path / f"out-{extra}"))
        assert result.exit_code == 0
        told = "bob: weights beside the adapter are left out: value_head.bin"
        assert (told in result.stderr) == extra
        questions.append(sorted(store.asked))

    assert questions[0] == questions[1]
    assert len([key for how, key in questions[1] if how == "ls" and "/bob" in key]) == 1


def test_a_client_that_is_one_file_has_nothing_beside_it(tmp_path: Path) -> None:
    from test_kohya import make_round as kohya_round

    folder, _ = kohya_round(tmp_path)
    (folder / "value_head.bin").write_bytes(b"weights")

    assert not [w for w in aggregate(folder, tmp_path / "out").warnings if "beside" in w]
