"""Flower in one process: a grid whose nodes are function calls, and clients that hardly train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fedlora_cli import StateDict
from fedlora_cli.integrations.flower import (
    FedLoRA,
    adapter_card,
    adapter_records,
    client_name,
    load_adapter,
    to_record,
)

try:  # a message takes its sender from here, in flwr 1.42
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
except ImportError:
    pass

#: Flower's code for an exception in a ClientApp.
_RAISED = 2


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 20}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **sizes)
    )


def classifier(rank: int) -> Any:
    """A classifier in bfloat16 with an adapter in float32 and a trained head in bfloat16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 20}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=3, **sizes)
    model = LlamaForSequenceClassification(config).to(torch.bfloat16)
    return peft_model(rank, model=model, task_type="SEQ_CLS")


def peft_model(rank: int, alpha: float | None = None, model: Any = None, **config: Any) -> Any:
    """A model with an adapter; alpha is twice the rank by default."""
    given = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": alpha or 2 * rank} | config
    return get_peft_model(model or base(), LoraConfig(r=rank, **given))


def train_a_little(model: Any, name: str, number: int) -> None:
    """Add numbers to all trained tensors that depend on the client and the round."""
    generator = torch.Generator().manual_seed(1000 * number + sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter += 0.1 * step.to(parameter.dtype)


Train = Callable[[Any, str, int], None]


@dataclass
class Clients:
    """A ClientApp whose nodes have models by name; it notes what they received and sent."""

    models: Mapping[str, Callable[[], Any]]
    samples: Mapping[str, float] = field(default_factory=dict)
    train: Train = train_a_little
    change: Callable[[str, RecordDict], None] = lambda name, content: None
    received: dict[str, StateDict] = field(default_factory=dict)
    sent: dict[str, StateDict] = field(default_factory=dict)

    def app(self, **options: Any) -> ClientApp:
        app = ClientApp(**options)

        @app.query()
        def query(message: Message, context: Context) -> Message:
            model = self.models[client_name(context)]()
            return Message(adapter_card(model, context), reply_to=message)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            name = client_name(context)
            model = self.models[name]()
            load_adapter(model, message)
            self.received[name] = StateDict.of(model)
            self.train(model, name, message.content["config"]["server-round"])
            samples = self.samples.get(name, 10)
            self.sent[name] = StateDict.of(model, samples)
            content = adapter_records(model, context, samples, {"train_loss": 1.0})
            self.change(name, content)
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            model = self.models[client_name(context)]()
            load_adapter(model, message)
            records = adapter_records(model, context, 10, {"rank": model.peft_config["default"].r})
            return Message(RecordDict({"metrics": records["metrics"]}), reply_to=message)

        return app


class Calls(Grid):
    """Nodes as function calls. Messages to nodes in `lost` come back as errors."""

    def __init__(
        self,
        app: ClientApp,
        names: Iterable[str],
        lost: Iterable[int] = (),
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.app, self.lost, self.run_config = app, set(lost), dict(run_config or {})
        self.names = dict(enumerate(names, 101))
        self.messages: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        sent = list(messages)
        self.messages += sent
        return [self._reply(message) for message in sent]

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.lost:
            reply = Message(Error(code=3, reason="the node is not there"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's, as in Flower
            return reply
        context = Context(
            run_id=1,
            node_id=node,
            node_config=self.node_config(node),
            state=RecordDict(),
            run_config=dict(self.run_config),
        )
        try:
            return self.app(message, context)
        except Exception as error:
            # As Flower words it.
            reason = str(type(error)) + ":<'" + str(error) + "'>"
            return Message(Error(code=_RAISED, reason=reason), reply_to=message)

    def node_config(self, node: int) -> dict[str, Any]:
        return {"name": self.names[node]}

    def of_type(self, kind: str, name: str) -> list[Message]:
        """The messages of a type to the node of this name."""
        (node,) = (node for node, other in self.names.items() if other == name)
        return [
            message
            for message in self.messages
            if message.metadata.message_type == kind and message.metadata.dst_node_id == node
        ]

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def set_run(self, *run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...

    def push_messages(self, messages: Any) -> Any: ...

    def pull_messages(self, message_ids: Any) -> Any: ...


RANKS = {"ann": 4, "bob": 8, "cy": 6}


def of_ranks(ranks: Mapping[str, int] = RANKS, **options: Any) -> Clients:
    models = {name: lambda rank=rank: peft_model(rank) for name, rank in ranks.items()}
    return Clients(models, **options)


def strategy(
    initial: Any = None, kind: type[FedLoRA] = FedLoRA, **options: Any
) -> tuple[FedLoRA, ArrayRecord]:
    """A strategy for three nodes without evaluation, and its initial arrays, of rank 8."""
    model = peft_model(8) if initial is None else initial
    given = {"min_train_nodes": 3, "min_available_nodes": 3, "fraction_evaluate": 0.0} | options
    config = model.peft_config["default"]
    return kind(lora_config=config, **given), to_record(get_peft_model_state_dict(model))


def run(clients: Clients, number: int = 1, initial: Any = None, **options: Any) -> FedLoRA:
    made, arrays = strategy(initial, **options)
    made.start(Calls(clients.app(), clients.models), arrays, num_rounds=number)
    return made
