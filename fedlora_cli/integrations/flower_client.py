"""The client's side of a federation in Flower: an adapter out of a message, and into a reply."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.integrations.federation import at_terms
from fedlora_cli.integrations.flower_records import CARD, card, config_in, to_record, to_tensors
from fedlora_cli.rounds.in_memory import distribute_state_dict
from fedlora_cli.rounds.state_dict import StateDict

#: The fields of a LoRA config that, with the shapes, decide how factors are scaled.
_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def load_adapter(
    model: Any,
    message: Message,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    alpha: float | None = None,
) -> None:
    """Load the adapter of a message from the server into a PEFT model.

    The model keeps its rank and its alpha, unless others are given. From an adapter of a higher
    rank it takes the first rank indices, as the server does for a client that it knows; above the
    rank of the adapter, A gets random rows and B zero columns. Raises InputError.
    """
    from peft import set_peft_model_state_dict

    _resize(model, adapter_name, rank, alpha)
    own = StateDict.of(model, adapter_name=adapter_name)
    tensors = _at_own_rank(message, own)
    for name in sorted(own.tensors.keys() | tensors.keys()):
        shapes = [tuple(one[name].shape) if name in one else None for one in (own.tensors, tensors)]
        if shapes[0] != shapes[1]:
            found = f"{name} has shape {shapes[1]}, in the model {shapes[0]}"
            raise InputError("the server's adapter", found, "use the server's LoRA config")
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)


def adapter_records(
    model: Any,
    context: Context,
    num_examples: float,
    metrics: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
) -> RecordDict:
    """The content of a reply with the model's adapter, the number of examples and metrics."""
    state = StateDict.of(model, adapter_name=adapter_name)
    return RecordDict(
        {
            "arrays": to_record(state.tensors),
            "metrics": MetricRecord({"num-examples": num_examples, **(metrics or {})}),
            CARD: card(state, name=client_name(context)),
        }
    )


def adapter_card(model: Any, context: Context, adapter_name: str = "default") -> RecordDict:
    """The content of a reply to a QUERY: the client's name, the rank and the scaling."""
    state = StateDict.of(model, adapter_name=adapter_name)
    return RecordDict({CARD: card(state, name=client_name(context))})


def client_name(context: Context) -> str:
    """The client's name in all rounds: `name` or `partition-id` of the node config.

    Without either, it is the node's number, which changes when a SuperNode without authentication
    starts again.
    """
    config = context.node_config
    if "name" in config:
        return str(config["name"])
    if "partition-id" in config:
        return f"partition-{config['partition-id']}"
    return f"node-{context.node_id}"


def _resize(model: Any, adapter_name: str, rank: int | None, alpha: float | None) -> None:
    """Replace the model's adapter by a new one of this rank and alpha."""
    config = model.peft_config[adapter_name]
    changed = copy(config)
    changed.r = config.r if rank is None else rank
    changed.lora_alpha = config.lora_alpha if alpha is None else alpha
    if (changed.r, changed.lora_alpha) != (config.r, config.lora_alpha):
        model.delete_adapter(adapter_name)
        model.add_adapter(adapter_name, changed)
        model.set_adapter(adapter_name)


def _at_own_rank(message: Message, own: StateDict) -> dict[str, Tensor]:
    """The tensors of the message, at the ranks and scalings of `own`. Raises InputError."""
    arrays = list(message.content.array_records.values())
    if len(arrays) != 1:
        found = f"{len(arrays)} array records in the server's message"
        raise InputError("the server's adapter", found, "send messages by FedLoRA")
    tensors = to_tensors(arrays[0])
    if CARD not in message.content.config_records:  # another strategy, which sends one rank to all
        return tensors
    terms = message.content.config_records[CARD]
    config = config_in(terms, "the server's adapter")
    # Every machine has the base model at another path.
    base = own.config.get("base_model_name_or_path")
    sent = StateDict(tensors, {**config, "base_model_name_or_path": base})
    if all(sent.config.get(name) == own.config.get(name) for name in _SCALING):
        return tensors
    if own.config.get("rank_pattern") or own.config.get("alpha_pattern"):
        return dict(distribute_state_dict(sent, like={"own": own})["own"].tensors)
    ordered = terms.get("ordered") is not False
    return dict(at_terms(sent, own.rank, own.scaling, ordered=ordered).tensors)
