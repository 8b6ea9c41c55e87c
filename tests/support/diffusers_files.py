"""LoRA files as diffusers and its relatives save them, and what their loaders apply."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

KEY = "lora_adapter_metadata"
NAME = "pytorch_lora_weights.safetensors"

#: Where alphas stand.
Alphas = Literal["rank", "tensors", "metadata"]

#: (out, in, *kernel) of the modules, by component.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (24, 20),
        "down_blocks.0.resnets.0.conv1": (16, 6, 3, 3),
        "conv_in": (10, 4, 3, 3),
    },
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (18, 30)},
}


@dataclass(frozen=True)
class Client:
    """A file to make; `conv_rank` is that of convolutions, and `conv_alpha` their alpha."""

    name: str
    rank: int
    alpha: float
    samples: int
    conv_rank: int = 0
    conv_alpha: float = 0.0
    rslora: bool = False

    def rank_of(self, module: str) -> int:
        return (self.conv_rank or self.rank) if "conv" in module else self.rank

    def alpha_of(self, module: str, alphas: Alphas) -> float:
        if alphas == "rank":
            return float(self.rank_of(module))
        return (self.conv_alpha or self.alpha) if "conv" in module else self.alpha

    def scale_of(self, module: str, alphas: Alphas) -> float:
        rank = self.rank_of(module)
        root = self.rslora and alphas == "metadata"
        return self.alpha_of(module, alphas) / (rank**0.5 if root else rank)


ROUND = (
    Client("ann", 2, 1.0, 30),
    Client("bob", 5, 10, 11, conv_rank=3, conv_alpha=1.5),
    Client("cy", 4, 16, 50),
    Client("dee", 3, 2.5, 9, rslora=True),
)


def factors(client: Client, key: str, shape: tuple[int, ...], *, frozen: bool) -> tuple[Any, Any]:
    """B and A of a module, the same for every style; `frozen` gives all clients one A."""
    generator = torch.Generator().manual_seed(sum(f"{client.name}{key}".encode()))
    rows, *sides = shape
    rank = client.rank_of(key)
    B = torch.randn(rows, rank, *(1 for _ in sides[1:]), generator=generator)
    if frozen:
        generator.manual_seed(0)
    return B, torch.randn(8, *sides, generator=generator)[:rank].contiguous()


def tensors_of(
    client: Client,
    alphas: Alphas = "rank",
    shapes: dict[str, dict[str, tuple[int, ...]]] = SHAPES,
    endings: tuple[str, str] = (".lora_B.weight", ".lora_A.weight"),
    *,
    frozen: bool = False,
) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for component, modules in shapes.items():
        for module, shape in modules.items():
            key = f"{component}.{module}" if component else module
            B, A = factors(client, module, shape, frozen=frozen)
            tensors |= {key + endings[0]: B, key + endings[1]: A}
            if alphas == "tensors":
                tensors[f"{key}.alpha"] = torch.tensor(client.alpha_of(module, alphas))
    return tensors


def metadata_of(
    client: Client, shapes: dict[str, dict[str, tuple[int, ...]]] = SHAPES
) -> dict[str, Any]:
    """As `_pack_dict_with_prefix` puts LoraConfig.to_dict() together; patterns for convolutions."""
    fields: dict[str, Any] = {}
    for component, modules in shapes.items():
        convolutions = [module for module in modules if "conv" in module]
        config = {
            "r": client.rank,
            "lora_alpha": client.alpha,
            "rank_pattern": {f"^{re.escape(m)}": client.rank_of(m) for m in convolutions},
            "alpha_pattern": {
                f"^{re.escape(m)}": client.alpha_of(m, "metadata") for m in convolutions
            },
            "target_modules": sorted({module.split(".")[-1] for module in modules}),
            "use_rslora": client.rslora,
            "peft_type": "LORA",
            "bias": "none",
            "use_dora": False,
            "modules_to_save": None,
            "peft_version": "0.19.0",
        }
        fields |= {f"{component}.{key}" if component else key: v for key, v in config.items()}
    return fields


def save(path: Path, tensors: dict[str, Any], fields: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({} if fields is None else {KEY: json.dumps(fields)})
    save_file(tensors, path, metadata=metadata)
    return path


def make_round(
    root: Path, alphas: Alphas, clients: tuple[Client, ...] = ROUND, *, frozen: bool = False
) -> Path:
    """A folder of clients' folders, each with a file as diffusers names it and a sample count."""
    for client in clients:
        fields = metadata_of(client) if alphas == "metadata" else None
        save(root / client.name / NAME, tensors_of(client, alphas, frozen=frozen), fields)
        (root / client.name / "fedlora.json").write_text(json.dumps({"samples": client.samples}))
    return root


def applied(file: Path) -> dict[str, np.ndarray]:
    """The update of every module by the rules that diffusers documents: alpha / r · B A, with alpha
    from the file's metadata by component, else from its tensor, else r.
    """
    with safe_open(file, "np") as opened:
        fields = json.loads(opened.metadata().get(KEY, "{}"))
    tensors = load_file(file)
    result = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        A = tensors[key].astype("f8")
        B = tensors[f"{name}.lora_B.weight"].astype("f8")
        rank = len(A)
        scale = float(tensors.get(f"{name}.alpha", np.array(rank))) / rank
        if fields:
            scale = _configured(fields, name, rank)
        result[name] = scale * B.reshape(len(B), -1) @ A.reshape(rank, -1)
    return result


def _configured(fields: dict[str, Any], name: str, rank: int) -> float:
    component, _, module = name.partition(".")
    if f"{component}.r" not in fields:
        component, module = "", name
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in fields.items()
        if not component or key.startswith(f"{component}.")
    }

    def value(pattern: str, usual: str) -> Any:
        fits = (k for k in own[pattern] if re.match(rf"(.*\.)?({k})$", module))
        key = next(fits, None)
        return own[usual] if key is None else own[pattern][key]

    assert value("rank_pattern", "r") == rank
    targets = own["target_modules"]
    if isinstance(targets, str):
        assert re.fullmatch(targets, module)
    else:
        assert any(module == one or module.endswith(f".{one}") for one in targets)
    alpha = value("alpha_pattern", "lora_alpha")
    return float(alpha / (rank**0.5 if own["use_rslora"] else rank))
