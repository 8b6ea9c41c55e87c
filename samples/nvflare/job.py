"""A federation in NVFlare's simulator: three sites of ranks 4, 8 and 16, a tiny Llama, two rounds.

    python samples/nvflare/job.py run [--rounds 2] [--method raflora] [--trainer] [--offload]

It needs no network and no GPU. A second call with the same folder goes on where the first ended.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from nvflare.recipe import SimEnv, set_per_site_config
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_cli import InitOptions, initialize
from fedlora_cli.integrations.nvflare import FedLoRARecipe

RANKS = {"site-1": 4, "site-2": 8, "site-3": 16}
MODULES = ("q_proj", "v_proj", "up_proj")
HERE = Path(__file__).parent


def prepare(run: Path) -> Path:
    """The first global adapter, of the largest rank, and a base model with random weights."""
    base, adapters = run / "base", run / "initial"
    if not base.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        LlamaForCausalLM(LlamaConfig(**sizes, **layers)).save_pretrained(base)
    if not adapters.exists():
        largest = max(RANKS.values())
        options = InitOptions(ranks=(largest,), alpha=2.0 * largest, target_modules=MODULES)
        initialize(base, adapters, (), options)
    return adapters / f"rank-{max(RANKS.values())}"


def recipe_for(run: Path, rounds: int, client: str, **options: Any) -> FedLoRARecipe:
    """The server's part. Every site trains by the same script, at its own rank."""
    recipe = FedLoRARecipe(
        adapter=prepare(run),
        rounds=run / "rounds",
        ranks=RANKS,
        min_clients=len(RANKS),
        num_rounds=rounds,
        train_script=str(HERE / client),
        key_metric="eval_loss",
        key_metric_mode="min",
        **options,
    )
    base = (run / "base").absolute()
    arguments = {
        site: {"train_args": f"--base {base} --rank {rank} --seed {number}"}
        for number, (site, rank) in enumerate(RANKS.items())
    }
    set_per_site_config(recipe, arguments)
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description="A federation in NVFlare's simulator.")
    parser.add_argument("run", type=Path, help="folder of the base model and of all rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--method", default="raflora")
    parser.add_argument("--trainer", action="store_true", help="train with transformers' Trainer")
    parser.add_argument("--offload", action="store_true", help="receive tensors on disk")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    workspace = str(args.run / "workspace")
    client = "client_trainer.py" if args.trainer else "client.py"
    recipe = recipe_for(
        args.run,
        args.rounds,
        client,
        method=args.method,
        enable_tensor_disk_offload=args.offload,
    )
    run = recipe.execute(SimEnv(clients=list(RANKS), workspace_root=workspace))
    print("status:", run.get_status())
    for folder in sorted((args.run / "rounds").glob("*/global")):
        print("global adapter:", folder)


if __name__ == "__main__":
    main()
