"""Adapters of other tools, and parts of adapters: errors name the cause, and the way out works."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from support.adapters import PREFIX, WEIGHTS, Spec, make
from support.peft_layers import llama, train

from fedlora_cli import InputError, aggregate, inspect, read

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "samples/from_mlx.py"

#: Modules of the tiny model by their (in, out), as MLX has them: of an embedding, (tokens, width).
MLX = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.mlp.down_proj": (24, 16),
    "model.embed_tokens": (30, 16),
}


def of_mlx(folder: Path, **config: object) -> Path:
    """An adapter as mlx_lm 0.32 writes it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(folder.name))
    tensors = {}
    for module, (rows, columns) in MLX.items():
        tensors[f"{module}.lora_a"] = torch.randn(rows, 4, generator=generator)
        tensors[f"{module}.lora_b"] = torch.randn(4, columns, generator=generator)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    fields = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0},
        "model": "tiny",
        "num_layers": 2,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def test_an_adapter_of_mlx_is_told_by_its_content(tmp_path: Path) -> None:
    """A folder, its file, and its tensors under PEFT's names of files."""
    folder = of_mlx(tmp_path / "round/a")
    renamed = of_mlx(tmp_path / "renamed/a")
    (renamed / "adapters.safetensors").rename(renamed / WEIGHTS)
    config = make(tmp_path, Spec("of_peft", rank=4)).folder / "adapter_config.json"
    (renamed / "adapter_config.json").write_text(config.read_text())

    for place in (folder, folder / "adapters.safetensors", renamed):
        with pytest.raises(InputError, match=r"an adapter of MLX, .*; convert it with samples/"):
            aggregate(place, tmp_path / "out")
    for place in (folder, folder / "adapters.safetensors"):
        report = inspect(place)
        assert ["an adapter of MLX" in fault.found for fault in report.faults] == [True]
        assert report.adapters[0].notes == ()


def test_the_way_to_convert_it_keeps_the_update(tmp_path: Path) -> None:
    folder = of_mlx(tmp_path / "mlx")
    tensors = load_file(folder / "adapters.safetensors")
    out = tmp_path / "round/a"

    subprocess.run([sys.executable, SCRIPT, folder, "-o", out, "--base", "tiny"], check=True)

    model = PeftModel.from_pretrained(llama(), out)
    layers = {name: one for name, one in model.named_modules() if hasattr(one, "lora_A")}
    for module in MLX:
        applied = layers[PREFIX + module].get_delta_weight("default").double()
        wanted = 20 * tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()
        wanted = wanted if module.endswith("embed_tokens") else wanted.T
        torch.testing.assert_close(applied, wanted, rtol=1e-5, atol=1e-5)
    assert len(aggregate(tmp_path / "round", tmp_path / "out").modules) == len(MLX)
    assert read(out).metadata.base_model == "tiny"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "dora"}, "trained as dora"),
        ({"fine_tune_type": "full"}, "trained as full"),
        ({"lora_parameters": {"rank": 4, "alpha": 8, "scale": 20.0}}, "older versions of MLX"),
    ],
)
def test_what_cannot_be_converted_is_not(tmp_path: Path, config, message: str) -> None:
    folder = of_mlx(tmp_path / "mlx", **config)

    convert = runpy.run_path(str(SCRIPT))["convert"]

    with pytest.raises(SystemExit, match=message):
        convert(folder, tmp_path / "out", None)

    assert not (tmp_path / "out").exists()


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: max(1, tensor.shape[0] // 2)].clone()


def first_of_three(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(3)[0].clone()


@pytest.mark.parametrize("sliced", [half, first_of_three])
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj"]},
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 8}},
        {"r": 4, "target_modules": ["embed_tokens"]},
    ],
    ids=["linear", "pattern", "embedding"],
)
def test_slices_of_one_process_are_told_as_such(
    tmp_path: Path, config, sliced: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    train(llama(), tmp_path / "round/a", 0, **config)
    path = tmp_path / "round/a" / WEIGHTS
    save_file({key: sliced(one) for key, one in load_file(path).items()}, path)

    with pytest.raises(InputError, match=r"one process.s slice, \d of \d rows; gather the shards"):
        aggregate(tmp_path / "round", tmp_path / "out")


def test_ranks_that_no_slicing_explains_are_told_as_before(tmp_path: Path) -> None:
    train(llama(), tmp_path / "round/a", 0, r=4, target_modules=["q_proj"])
    path = tmp_path / "round/a" / WEIGHTS
    tensors = load_file(path)
    cut = {key: one[:, :3].clone() if "lora_B" in key else one for key, one in tensors.items()}
    save_file(cut, path)

    with pytest.raises(InputError, match=r"differ in rank; A is \(rank, in\), B is"):
        aggregate(tmp_path / "round", tmp_path / "out")


def test_factors_that_were_saved_without_the_wrapper_around_the_model(tmp_path: Path) -> None:
    """As PEFT itself names them where its layers were injected into a model; then the way out."""
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = inject_adapter_in_model(config, llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "round/a"
    config.save_pretrained(folder)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key: one.contiguous() for key, one in saved.items()}
    assert not any(key.startswith(PREFIX) for key in tensors)
    save_file(tensors | {"lm_head.weight": torch.ones(30, 16)}, folder / WEIGHTS)

    with pytest.raises(
        InputError, match=r"and 6 more: names without base_model\.model\., .*; save by PeftModel"
    ):
        aggregate(tmp_path / "round", tmp_path / "out")
    assert len(inspect(tmp_path / "round").faults) == 1

    save_file({PREFIX + key: one for key, one in tensors.items()}, folder / WEIGHTS)
    assert len(aggregate(tmp_path / "round", tmp_path / "out").modules) == 3
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "out")
    own = {name: one for name, one in model.named_modules() if hasattr(one, "lora_A")}
    for name, one in loaded.named_modules():
        if hasattr(one, "lora_A"):
            applied = one.get_delta_weight("default")
            wanted = own[name.removeprefix(PREFIX)].get_delta_weight("default")
            torch.testing.assert_close(applied, wanted, rtol=1e-5, atol=1e-5)
