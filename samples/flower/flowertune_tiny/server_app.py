"""The server of the app."""

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune_tiny.dataset import load_held_out
from flowertune_tiny.models import get_model, loss_of
from flowertune_tiny.strategy import FlowerTuneLlm

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and save the global adapter of each."""
    cfg = context.run_config
    init_model = get_model(cfg)
    arrays = ArrayRecord(get_peft_model_state_dict(init_model))

    strategy = FlowerTuneLlm(
        lora_config=init_model.peft_config["default"],
        fraction_train=cfg["strategy.fraction-train"],
        fraction_evaluate=cfg["strategy.fraction-evaluate"],
    )
    strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=cfg["num-server-rounds"],
        evaluate_fn=get_evaluate_fn(cfg),
    )


def get_evaluate_fn(cfg: Any) -> Any:
    """The function that saves and evaluates the global adapter after each round."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = get_model(cfg)
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        model.save_pretrained(Path(cfg["results"]) / f"peft_{server_round}")
        with torch.no_grad():
            loss = loss_of(model.eval(), load_held_out()).item()
        return MetricRecord({"held_out_loss": loss})

    return evaluate
