"""Client cohorts with the shapes of real models, written as PEFT folders as fast as a disk takes.

    python tests/benchmarks/cohorts.py DIR --model llama-8b --clients 20 --layers 2

Every client trained from one global adapter whose spectrum decays, so that its factors are the
leading part of the global ones, with noise of its own; with --independent they are random and
have nothing in common, which is the hardest case there is for anything iterative.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.models import MODELS, Model, Module, model_of

#: Of every factor, relative to the first direction of the global one. It is as large as the last.
_NOISE = 0.125

#: How many random numbers there are. A tensor takes a run of them that begins anywhere, so that no
#: two tensors have their rows from the same ones, and drawing costs nothing.
_POOL = 2**24


@dataclass(frozen=True)
class Recipe:
    """What to write. The clients have these ranks in turn."""

    model: Model
    clients: int
    layers: int
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    independent: bool = False
    seed: int = 0

    def rank(self, k: int) -> int:
        """r_k.

        >>> [Recipe(MODELS["vit-b"], 5, 1).rank(k) for k in range(5)]
        [8, 16, 32, 64, 8]
        """
        return self.ranks[k % len(self.ranks)]

    @property
    def total_rank(self) -> int:
        """S = sum r_k."""
        return sum(self.rank(k) for k in range(self.clients))


@dataclass(frozen=True, eq=False)
class Pool:
    """Normal numbers in bfloat16, drawn once."""

    numbers: Tensor
    seed: int

    def matrix(self, chance: random.Random, *shape: int) -> Tensor:
        """A view of that shape which begins anywhere."""
        count = torch.Size(shape).numel()
        start = chance.randrange(self.numbers.numel() - count + 1)
        return self.numbers[start : start + count].view(shape)


def write(root: Path, recipe: Recipe) -> None:
    """Write the adapters of all clients to `root`, one folder each."""
    largest = max(
        one.experts * max(recipe.ranks) * max(one.rows, one.columns) for one in recipe.model.modules
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    numbers = torch.randn(_POOL + largest, generator=generator).bfloat16()
    pool = Pool(numbers, recipe.seed)
    shared = {} if recipe.independent else dict(_global(recipe, pool))
    for k in range(recipe.clients):
        folder = root / f"client-{k:04}"
        folder.mkdir(parents=True)
        _write_config(folder, recipe, recipe.rank(k))
        chance = random.Random(f"{recipe.seed} {k}")
        samples = {"samples": chance.randrange(100, 1000)}
        (folder / "fedlora.json").write_text(json.dumps(samples))
        _write_weights(folder / "adapter_model.safetensors", recipe, k, shared, pool, chance)


def _global(recipe: Recipe, pool: Pool) -> Iterator[tuple[str, Tensor]]:
    """The factors of the global adapter: σ_i falls as 1 / i, half of it in each factor."""
    rank = max(recipe.ranks)
    root = torch.arange(1, rank + 1).rsqrt().bfloat16()[:, None]
    for key, module, side in _tensors(recipe):
        chance = random.Random(f"{recipe.seed} {key}")
        yield key, pool.matrix(chance, *_shape(module, side, rank)) * (_size(module, side) * root)


def _tensors(recipe: Recipe) -> list[tuple[str, Module, str]]:
    """Key, module and side of every tensor, in the order of safetensors: that of the keys."""
    prefix = f"base_model.model.{recipe.model.prefix}"
    return sorted(
        ((f"{prefix}{layer}.{one.name}.lora_{side}.weight", one, side))
        for layer in range(recipe.layers)
        for one in recipe.model.modules
        for side in "AB"
    )


def _shape(module: Module, side: str, rank: int) -> tuple[int, int, int]:
    """As PEFT lays out the experts of one pair: A expert by expert, B direction by direction."""
    if side == "A":
        return module.experts, rank, module.columns
    return module.rows, rank, module.experts


def _size(module: Module, side: str) -> float:
    """The spread of numbers that makes directions of length one."""
    return float((module.columns if side == "A" else module.rows) ** -0.5)


def _write_weights(
    path: Path,
    recipe: Recipe,
    k: int,
    shared: dict[str, Tensor],
    pool: Pool,
    chance: random.Random,
) -> None:
    """The safetensors file: its header, then tensor by tensor."""
    rank, tensors = recipe.rank(k), _tensors(recipe)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, module, side in tensors:
        start, shape = end, _shape(module, side, rank)
        end += 2 * torch.Size(shape).numel()
        flat = [shape[0] * rank, shape[2]] if side == "A" else [shape[0], rank * shape[2]]
        header[key] = {"dtype": "BF16", "shape": flat, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, module, side in tensors:
            noise = pool.matrix(chance, *_shape(module, side, rank))
            size = _size(module, side)
            if recipe.independent:
                tensor = noise * size
            else:
                tensor = torch.add(shared[key][:, :rank], noise, alpha=_NOISE * size)
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _write_config(folder: Path, recipe: Recipe, rank: int) -> None:
    model = recipe.model
    owners = {name.rsplit(".", 1)[0] for name in model.parameters}
    targets = [one.name for one in model.modules if not any(one.name.startswith(o) for o in owners)]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "target_parameters": list(model.parameters) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-8b", help=f"{', '.join(MODELS)}, or NAME/4")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--layers", type=int, default=1, help="0: all of them")
    parser.add_argument("--ranks", default="8,16,32,64", help="the clients have these in turn")
    parser.add_argument("--independent", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    model = model_of(chosen.model)
    ranks = tuple(int(rank) for rank in chosen.ranks.split(","))
    layers = chosen.layers or model.layers
    recipe = Recipe(model, chosen.clients, layers, ranks, chosen.independent, chosen.seed)
    write(chosen.folder, recipe)


if __name__ == "__main__":
    main()
