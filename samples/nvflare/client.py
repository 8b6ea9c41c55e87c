"""A site: load the global adapter at the site's rank, train it, send it. NVFlare starts it."""

import argparse

import nvflare.client as flare
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedlora_cli.integrations.nvflare import load_adapter, lora_meta


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
    base = AutoModelForCausalLM.from_pretrained(args.base)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model = get_peft_model(base, config)

    flare.init()
    while flare.is_running():
        received = flare.receive()
        load_adapter(model, received)
        with torch.no_grad():
            before = model(input_ids=data, labels=data).loss.item()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(3):
            for batch in data[torch.randperm(len(data))].split(20):
                optimizer.zero_grad()
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
        print(f"{flare.get_site_name()}: rank {args.rank}, loss of the global adapter {before:.3f}")
        flare.send(
            flare.FLModel(
                params=get_peft_model_state_dict(model),
                metrics={"eval_loss": before},
                meta=lora_meta(model, samples=len(data)),
            )
        )


if __name__ == "__main__":
    main()
