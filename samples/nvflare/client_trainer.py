"""A site with the Trainer of transformers, through NVFlare's `patch`. NVFlare starts it."""

import argparse
from pathlib import Path
from typing import Any

import nvflare.client.hf as flare
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedlora_cli.integrations.nvflare import lora_meta


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    # Any data set: here sequences that count up from a random number, with some noise.
    start = torch.randint(0, 100, (40 + 20 * args.seed, 1))
    data = (start + torch.arange(16)).where(torch.rand(len(start), 16) > 0.05, 0) % 128
    rows = [{"input_ids": row, "labels": row} for row in data]
    base = AutoModelForCausalLM.from_pretrained(args.base)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model: Any = get_peft_model(base, config)
    model.__fl_meta__ = lora_meta(model, samples=len(rows))

    place = Path.cwd() / f"trainer-{args.rank}"
    options = TrainingArguments(
        str(place),
        learning_rate=5e-3,
        per_device_train_batch_size=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows)
    # The filter sends each site its rank, as the Trainer's loading wants it.
    flare.patch(trainer, params_scope="adapter", local_epochs=3)
    while flare.is_running():
        before = trainer.evaluate()["eval_loss"]
        print(f"{flare.get_site_name()}: rank {args.rank}, loss of the global adapter {before:.3f}")
        trainer.train()


if __name__ == "__main__":
    main()
