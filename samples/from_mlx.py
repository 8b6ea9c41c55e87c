"""A client that trained with MLX (mlx_lm.lora): its adapter, as PEFT writes it.

    python samples/from_mlx.py adapters -o round-01/clinic-a --base meta-llama/Llama-3.2-1B

`adapters` is the folder that mlx_lm wrote. The update stays the same: MLX applies
scale * (lora_a @ lora_b).T, PEFT lora_alpha / r * lora_B @ lora_A.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."


def convert(source: Path, target: Path, base: str | None) -> None:
    """Write the adapter in `source` to the new folder `target`, as of the base model `base`.

    Ends the program where PEFT has nothing that applies the same update.
    """
    config = json.loads((source / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    if config.get("fine_tune_type", "lora") != "lora":
        raise SystemExit(f"it was trained as {config['fine_tune_type']}, not as lora")
    if "alpha" in parameters:
        advice = "write the scale that was applied, and no alpha"
        raise SystemExit(f"older versions of MLX multiply scale by alpha / rank: {advice}")
    rank, tensors = parameters["rank"], {}
    for key, tensor in load_file(source / "adapters.safetensors").items():
        if tensor.ndim != 2:
            raise SystemExit(f"{key}: experts in one tensor have no place in PEFT's files")
        tensors[PREFIX + name(key)] = tensor.T.contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=parameters["scale"] * rank,
        target_modules=sorted(modules(tensors)),
        inference_mode=True,
    ).save_pretrained(target)


def name(key: str) -> str:
    """PEFT's name of a factor: that of an embedding has another one."""
    module, _, side = key.rpartition(".lora_")
    if module.endswith("embed_tokens"):
        return f"{module}.lora_embedding_{side.upper()}"
    return f"{module}.lora_{side.upper()}.weight"


def modules(tensors: dict[str, Tensor]) -> set[str]:
    """The full names of the adapted modules."""
    return {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder that mlx_lm.lora wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the client")
    parser.add_argument("--base", help="name of the base model, as the other clients give it")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.output, arguments.base)
