"""diffusers itself, where it is installed, on both sides: it saves clients and loads the result.

What it applies is compared in float64. Without it, test_diffusers.py holds the same rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.adapters import truncated

from fedlora_cli import AggregateOptions, InputError, aggregate, distribute, read

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

COUNTS = (3, 5, 9)
RANKS = (4, 6, 2)

Update = dict[str, torch.Tensor]


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    )
    return diffusers.StableDiffusionPipeline(unet=unet, **nothing, requires_safety_checker=False)


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    nothing = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    return diffusers.FluxPipeline(transformer=transformer, **nothing)


#: How to make a pipeline, the model in it that is trained, and which of its layers.
Case = tuple[Callable[[], Any], str, tuple[str, ...]]
CASES: dict[str, Case] = {
    "Stable Diffusion": (stable_diffusion, "unet", ("to_q", "conv1", "to_out.0", "conv_in")),
    "Flux": (flux, "transformer", ("to_q", "proj_out", "ff.net.2")),
}


def updates_of(model: Any) -> Update:
    """What PEFT's layers in a model apply, dense, in float64."""
    return {
        name: layer.scaling[adapter]
        * layer.lora_B[adapter].weight.double().flatten(1)
        @ layer.lora_A[adapter].weight.double().flatten(1)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.lora_A
    }


def loaded(case: Case, where: Path) -> Update:
    pipeline = case[0]()
    pipeline.load_lora_weights(str(where))
    with torch.no_grad():
        return updates_of(getattr(pipeline, case[1]))


def make_round(root: Path, case: Case, style: str) -> list[Path]:
    """Clients as diffusers saves them, in one of the styles that there are."""
    make_pipeline, component, targets = case
    for number, rank in enumerate(RANKS):
        pipeline = make_pipeline()
        model = getattr(pipeline, component)
        config = LoraConfig(
            r=rank,
            lora_alpha=2.0 * number + 1,
            target_modules=list(targets),
            rank_pattern={"to_q": 3},
            alpha_pattern={"to_q": 5},
            use_rslora=number == 1 and style == "metadata",
        )
        model.add_adapter(config)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        state = get_peft_model_state_dict(model)
        if style == "scripts":
            state = diffusers.utils.convert_state_dict_to_diffusers(state)
        given = {f"{component}_lora_layers": state}
        if style == "metadata":
            fields = model.peft_config["default"].to_dict()
            given[f"{component}_lora_adapter_metadata"] = fields
        folder = root / f"client-{number}"
        pipeline.save_lora_weights(str(folder), **given)
        file = folder / "pytorch_lora_weights.safetensors"
        if style == "tensors":
            tensors = load_file(file)
            for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
                alpha = torch.tensor(2.0 * number + 1)
                tensors[key.replace(".lora_A.weight", ".alpha")] = alpha
            save_file(tensors, file)
        (folder / "fedlora.json").write_text(json.dumps({"samples": COUNTS[number]}))
    return sorted(root.iterdir())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


#: Stable Diffusion's loader takes no alphas in tensors.
STYLES = [(name, style) for name in CASES for style in ("plain", "metadata")]


@pytest.mark.parametrize(
    ("name", "style"), [*STYLES, ("Flux", "tensors"), ("Stable Diffusion", "scripts")]
)
def test_it_applies_the_mean_of_what_it_applies_for_the_clients(
    tmp_path: Path, name: str, style: str
) -> None:
    case = CASES[name]
    if style == "scripts":  # which train no other layers under these names
        case = (*case[:2], ("to_q", "to_k", "to_v", "to_out.0"))
    folders = make_round(tmp_path / "in", case, style)
    clients = [loaded(case, folder) for folder in folders]
    # The full mean: the sum of the ranks is enough for all of it.
    report = aggregate(
        tmp_path / "in", tmp_path / "out", AggregateOptions(method="flexlora", rank=12, verify=True)
    )

    found = loaded(case, tmp_path / "out")
    assert set(found) == set(clients[0])
    for key, update in found.items():
        weighted = zip(COUNTS, clients, strict=True)
        mean = sum(count * client[key] for count, client in weighted) / sum(COUNTS)
        assert distance(update, mean) < 1e-6
    assert report.format == "diffusers"

    distribute(tmp_path / "out", tmp_path / "start", tmp_path / "in")
    for folder, client in zip(folders, clients, strict=True):
        handed = loaded(case, tmp_path / "start" / folder.name)
        assert set(handed) == set(client)
        for key, update in handed.items():
            rank = int(torch.linalg.matrix_rank(client[key]))
            best = torch.from_numpy(truncated(found[key].numpy(), rank))
            assert distance(update, best) < 1e-6


def factors_of(adapter: Any) -> Update:
    found = {name: module.read() for name, module in adapter.modules.items()}
    return {name: one.scale * one.B.double() @ one.A.double() for name, one in found.items()}


def test_the_way_out_for_names_of_2023_leads_out(tmp_path: Path) -> None:
    tensors = {}
    for name, module in stable_diffusion().unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            layers = {"q": module.to_q, "k": module.to_k, "v": module.to_v, "out": module.to_out[0]}
            for part, layer in layers.items():
                key = f"unet.{name}.processor.to_{part}_lora"
                tensors[f"{key}.down.weight"] = torch.randn(3, layer.in_features)
                tensors[f"{key}.up.weight"] = torch.randn(layer.out_features, 3)
    save_file(tensors, tmp_path / "old.safetensors")
    with pytest.raises(InputError, match=r"pipe\.unet\.save_lora_adapter\(FOLDER\)"):
        read(tmp_path / "old.safetensors")

    pipe = stable_diffusion()
    pipe.load_lora_weights(str(tmp_path / "old.safetensors"), adapter_name="default")
    pipe.unet.save_lora_adapter(str(tmp_path / "new"))
    found = factors_of(read(tmp_path / "new"))
    expected = updates_of(pipe.unet)
    assert set(found) == set(expected)
    assert all(distance(found[key], expected[key].detach()) < 1e-6 for key in found)


def test_the_way_out_for_names_of_xlabs_leads_out(tmp_path: Path) -> None:
    tensors = {}
    for part, rows in (("qkv", 48), ("proj", 16)):
        for number in (1, 2):
            key = f"double_blocks.0.processor.{part}_lora{number}"
            tensors[f"{key}.down.weight"] = torch.randn(3, 16)
            tensors[f"{key}.up.weight"] = torch.randn(rows, 3)
    save_file(tensors, tmp_path / "old.safetensors")
    with pytest.raises(InputError, match=r"FluxPipeline\.lora_state_dict\(FILE\)"):
        read(tmp_path / "old.safetensors")

    converted = diffusers.FluxPipeline.lora_state_dict(str(tmp_path / "old.safetensors"))
    save_file({name: t.clone() for name, t in converted.items()}, tmp_path / "new.safetensors")
    found = factors_of(read(tmp_path / "new.safetensors"))
    pipe = flux()
    pipe.load_lora_weights(str(tmp_path / "old.safetensors"))
    expected = updates_of(pipe.transformer)
    assert {key.removeprefix("transformer.") for key in found} == set(expected)
    for key, update in found.items():
        assert distance(update, expected[key.removeprefix("transformer.")].detach()) < 1e-6
