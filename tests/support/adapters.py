"""Small adapters on disk, made by hand, and the slow, obvious answers to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Made:
    """A client as it was made: dense float64 updates beside the files."""

    folder: Path
    samples: float
    factors: dict[str, tuple[np.ndarray, np.ndarray, float]]  # B, A, scale

    def update(self, module: str) -> np.ndarray:
        B, A, scale = self.factors[module]
        return scale * B @ A


@dataclass(frozen=True)
class Spec:
    """What to make. `shapes` are (out, in) by module; `ranks` overrides `rank` by module."""

    name: str
    rank: int
    samples: float | None = 1
    alpha: float = 8
    rslora: bool = False
    shapes: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"layers.0.q_proj": (12, 20), "layers.0.v_proj": (7, 20)}
    )
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def make(root: Path, spec: Spec) -> Made:
    """Write the adapter that the spec describes to `root / name`."""
    generator = torch.Generator().manual_seed(spec.seed * 1000 + sum(spec.name.encode()))
    folder = root / spec.name
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    factors = {}
    for module, (rows, columns) in spec.shapes.items():
        rank = spec.ranks.get(module, spec.rank)
        alpha = spec.alphas.get(module, spec.alpha)
        B = torch.randn(rows, rank, generator=generator).to(spec.dtype)
        A = torch.randn(rank, columns, generator=generator).to(spec.dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        scale = alpha / (rank**0.5 if spec.rslora else rank)
        factors[module] = (B.double().numpy(), A.double().numpy(), scale)
    tensors |= {PREFIX + name: tensor for name, tensor in spec.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": sorted(spec.shapes),
        "rank_pattern": {f"^{module}": rank for module, rank in spec.ranks.items()},
        "alpha_pattern": {f"^{module}": alpha for module, alpha in spec.alphas.items()},
        "base_model_name_or_path": "tiny/base",
        **spec.config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if spec.samples is not None:
        (folder / "fedlora.json").write_text(json.dumps({"samples": spec.samples}))
    return Made(folder, spec.samples or 1.0, factors)


def config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter."""
    return json.loads((folder / CONFIG).read_text())


def written_update(folder: Path, module: str) -> np.ndarray:
    """The dense float64 update that a written adapter applies, from its files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    B = tensors[f"{PREFIX}{module}.lora_B.weight"].double().numpy()
    A = tensors[f"{PREFIX}{module}.lora_A.weight"].double().numpy()
    assert B.shape[1] == A.shape[0] == config["r"]
    return config["lora_alpha"] / config["r"] * B @ A


def truncated(update: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of that rank, by a dense SVD."""
    U, s, Vh = np.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found - expected‖_F / ‖expected‖_F."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
