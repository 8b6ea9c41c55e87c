"""Make the sample rounds: eight rounds of the sample clients under FlexLoRA, and under raFLoRA.

Every round, each client of `make_samples.py` takes the global adapter at its own rank (the leading
singular directions, as they stand in the file), trains it on its own digits, and the server
aggregates. Kept are the global adapters, in float16, with the reports beside them:
`rounds/<method>/round-<t>/`. It runs for about two minutes.

    python samples/make_rounds.py [--output DIR] [--rounds N]
"""

import argparse
import shutil
import warnings
from pathlib import Path

import torch
from make_samples import (
    RANKS,
    Digits,
    add_adapter,
    save_adapter,
    split_clients,
    split_digits,
    train,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import ViTForImageClassification
from transformers.utils import logging

import fedlora_cli as fedlora

SAMPLES = Path(__file__).parent
METHODS = ("flexlora", "raflora")
EPOCHS = 3  # of each client in each round
RATE = 2e-3


def start_from(model: PeftModel, adapter: Path, rank: int) -> None:
    """Load the leading directions of a global adapter into a client's model."""
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        path, _, last = name.rpartition(".")
        if path.endswith("lora_A"):
            own, value = f"{path}.default.{last}", value[:rank]
        elif path.endswith("lora_B"):
            own, value = f"{path}.default.{last}", value[:, :rank]
        else:
            own = f"{path}.modules_to_save.default.{last}"
        model.state_dict()[own].copy_(value)


def run(method: str, rounds: int, clients: dict[str, Digits], output: Path) -> None:
    base = ViTForImageClassification.from_pretrained(SAMPLES / "base")
    base.name_or_path = "samples/base"
    previous = None
    for t in range(1, rounds + 1):
        torch.manual_seed(t)
        folder = output / f"clients-{t:02}"
        for name, digits in clients.items():
            model = add_adapter(base, RANKS[name])
            if previous is not None:
                start_from(model, previous, RANKS[name])
            train(model, digits, epochs=EPOCHS, rate=RATE)
            save_adapter(model, len(digits[1]), folder / name)
        options = fedlora.AggregateOptions(
            method=method,
            dtype="float16",
            previous=previous if fedlora.METHODS[method].uses_previous else None,
        )
        target = output / f"round-{t:02}"
        report = fedlora.aggregate([folder], target, options)
        shutil.rmtree(folder)
        previous = target
        print(f"{method}, round {t}: ρ = {report.energy_ratio:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample rounds.")
    parser.add_argument("--output", type=Path, default=SAMPLES / "rounds", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=8, metavar="N")
    given = parser.parse_args()

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's call
    torch.set_num_threads(1)
    clients = split_clients(split_digits()[1])
    for method in METHODS:
        run(method, given.rounds, clients, given.output / method)


if __name__ == "__main__":
    main()
