"""The clients of the app."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora_cli.integrations.flower import adapter_records, load_adapter
from flowertune_tiny.dataset import load_data
from flowertune_tiny.models import cosine_annealing, fit, get_model

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the adapter on the texts of this client."""
    current_round = msg.content["config"]["server-round"]
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    cfg = context.run_config

    # Let's get the texts of this client.
    trainset = load_data(partition_id, num_partitions)

    # Load the model and initialize it with the received weights.
    model = get_model(cfg)
    load_adapter(model, msg, rank=context.node_config.get("rank", 4 << partition_id % 3))

    new_lr = cosine_annealing(
        current_round,
        cfg["num-server-rounds"],
        cfg["train.learning-rate-max"],
        cfg["train.learning-rate-min"],
    )
    train_loss = fit(model, trainset, cfg["train.epochs"], new_lr)

    # Construct and return the reply.
    metrics = {"train_loss": train_loss, "num-examples": len(trainset)}
    content = adapter_records(model, context, len(trainset), metrics)
    return Message(content=content, reply_to=msg)
